"""Sizes of a model as it is trained, found without memory: on PyTorch's fake tensors.

A forward pass of one row, and of two, shows what grows with the rows and what does not. That is
true of any architecture, of which a formula would have to know every norm and projection.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.loading import quiet
from ke_ray.planning.training_memory import ModelSizes
from ke_ray.training.loss import is_product
from ke_ray.training.parallel import decoder_layers

log = logging.getLogger(__name__)


def measure_sizes(
    config: PreTrainedConfig, *, sequence_length: int, precision: str, sharded: bool
) -> ModelSizes:
    """The sizes of a decoder with this configuration.

    Args:
        sequence_length: T, tokens of a row.
        precision: ``float32`` or ``bfloat16``.
        sharded: the weights are gathered in the compute dtype (FSDP).

    Weights of an attention with dropout are not counted, which only a CPU keeps.
    """
    config = copy.deepcopy(config)
    for name in ("attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    gathered = torch.bfloat16 if sharded and precision == "bfloat16" else torch.float32
    with FakeTensorMode(), quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=gathered)
        try:
            in_layers = sum(p.numel() for p in decoder_layers(model).parameters())
        except UnsupportedArchitectureError:  # said where it is trained, if it needs them
            in_layers = 0
        num_parameters = sum(p.numel() for p in model.parameters())
        model.train()
        saved, copied = None, 0
        try:
            with _silent():
                one, two = (_saved_bytes(model, n, sequence_length, precision) for n in (1, 2))
            saved, copied = two - one, 2 * one - two
        except Exception:
            # Experts are chosen by values, which fake tensors lack; and a configuration may make a
            # forward pass raise anything. Training says what is wrong; here it is not known.
            log.debug("activations are not known", exc_info=True)
    return ModelSizes(
        num_parameters=num_parameters,
        in_layers=in_layers,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        has_plain_head=is_product(model),
        saved_bytes=saved,
        copied_bytes=copied if precision == "bfloat16" else 0,
    )


def _saved_bytes(model: Any, num_rows: int, sequence_length: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass up to the head, without the weights."""
    weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # which also keeps the storages' numbers from returning

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Fake tensors hide that the mask is causal and no tensor of it is needed.
        is_mask = tensor.ndim == 4 and tensor.shape[1:] == (1, sequence_length, sequence_length)
        if _storage(tensor) not in weights and not is_mask:
            kept[_storage(tensor)] = tensor
        return tensor

    ids = torch.zeros((num_rows, sequence_length), dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextmanager
def _silent() -> Iterator[None]:
    """PyTorch logs what it cannot do with fake tensors, and raises it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
