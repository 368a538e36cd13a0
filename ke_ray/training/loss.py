"""Next-token losses that never hold the logits of all tokens at once.

Logits are [tokens, vocabulary]: 8 rows of 1,024 tokens take 1.6 GB in float32 with OLMo-1B's
vocabulary, and the cross-entropy and its gradient as much again. Above a bound the head and the
cross-entropy take a few hundred tokens at a time, and again in the backward pass, so that memory is
that of one chunk. Below it nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ke_ray.models.architectures import check_config
from ke_ray.studies.training import LOGITS_AT_ONCE
from ke_ray.training.parallel import unwrap

_IGNORED = -100


def row_losses(model: nn.Module, ids: Tensor, *, max_logits: int = LOGITS_AT_ONCE) -> Tensor:
    """Sum over positions of −ln p(next token), per row.

    Args:
        model: a causal language model, wrapped for several workers or not.
        ids: int64 [rows, T].
        max_logits: elements of the largest [tokens, vocabulary] to hold.

    Returns:
        float32 [rows], in nats; T − 1 targets a row.
    """
    # The last position gets an ignored target: shifting the logits would copy all of them.
    targets = F.pad(ids[:, 1:], (0, 1), value=_IGNORED)
    bare = unwrap(model)
    vocabulary = getattr(getattr(bare, "config", None), "vocab_size", 0)
    if ids.numel() * vocabulary <= max_logits or not is_product(bare):
        logits = model(input_ids=ids, use_cache=False).logits  # [rows, T, vocabulary]
        return _cross_entropy(logits.flatten(0, 1), targets.flatten()).view(ids.shape).sum(dim=1)
    at_once = max(1, max_logits // vocabulary)

    def losses_of(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        device_type = hidden.device.type
        # A cached bfloat16 copy of the head's weight would sum the chunks' gradients in bfloat16.
        autocast: dict[str, Any] = {
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
            "cache_enabled": False,
        }

        def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
            with torch.autocast(device_type, **autocast):
                return _cross_entropy(project(hidden), targets)

        parts = hidden.flatten(0, 1).split(at_once), targets.flatten().split(at_once)
        losses = [
            checkpoint(of_chunk, *piece, use_reentrant=False) for piece in zip(*parts, strict=True)
        ]
        return torch.cat(losses).view(ids.shape).sum(dim=1)

    with _instead_of_logits(bare, losses_of):
        return model(input_ids=ids, use_cache=False).logits


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=_IGNORED, reduction="none")


def is_product(model: Any) -> bool:
    """Whether the logits are the head's output as it is: neither scaled nor soft-capped.

    A user's description may lack what scales them.
    """
    entry = check_config(model.config)
    return not (
        entry.model_type
        or entry.logit_multiplier
        or entry.logit_divisor
        or getattr(model.config, "final_logit_softcapping", None)
    )


@contextmanager
def _instead_of_logits(
    model: Any, function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """``function(head, hidden)`` runs where the model calls its head, and takes its place.

    The model is still called as a whole, so that DistributedDataParallel and FSDP see its forward
    and backward passes.
    """
    head = model.get_output_embeddings()
    project = head.forward
    head.forward = lambda hidden: function(project, hidden)
    try:
        yield
    finally:
        del head.forward
