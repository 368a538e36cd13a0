"""One evaluation pass through a model: its mode, its limits, logits at chosen positions only.

The model is called as a whole, through its own ``forward`` with a hook before the LM head that
selects the positions. So logit scaling and soft-capping stay the model's, and sharded models
(FSDP) gather their weights as they do in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ke_ray.models.live import evaluation_mode

#: Bytes of the float32 logits of one pass, about.
_LOGIT_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


def max_positions(model: Any) -> int | None:
    """How many tokens the model takes, or None where its config does not say."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None


def plain_model(model: Any) -> Any:
    """The module behind DistributedDataParallel and ``torch.compile``."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


def logit_rows(device: torch.device, vocab_size: int) -> int:
    """The largest number of positions whose logits one pass should compute."""
    budget = _LOGIT_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return max(1, budget // (4 * vocab_size))


def autocast(model: Any, dtype: str) -> AbstractContextManager[Any]:
    """Form the model's products in ``bfloat16``, or in the weights' own dtype (``float32``)."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without compilation; restores modes and shards.

    Shapes change from batch to batch here, which compiled code would answer by recompiling.
    """
    with torch.no_grad(), evaluation_mode(model):
        yield


def read_logits(model: Any, input_ids: Tensor, reads: Tensor, **arguments: Any) -> Tensor:
    """Logits at some positions of a batch.

    Args:
        model: a causal language model of transformers (``plain_model``).
        input_ids: int64 [batch, pos].
        reads: int64 [n_reads], positions in the flattened batch.
        arguments: further keyword arguments of the model's forward.

    Returns:
        [n_reads, vocab] in the dtype the model computes them in.
    """

    def keep_reads(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args  # [batch, pos, d_model]
        return (hidden.flatten(0, 1)[reads][None], *rest)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_reads)
    try:
        output = model(input_ids, use_cache=False, **arguments)
    finally:
        hook.remove()
    logits: Tensor = output.logits[0]
    return logits
