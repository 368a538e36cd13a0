"""Models whose weights are divided among workers (FSDP2), as forward passes meet them.

Every forward pass is a collective then: all workers make it, through the whole model, because its
outermost module gathers what belongs to no layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether every worker holds a part of the weights only."""
    return bool(_sharded_modules(model))


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: without a backward pass, FSDP keeps those outside the layers."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if shards(each)]


def shards(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    # By a method of FSDPModule: its import takes most of a second, for which no scan has a use.
    return hasattr(module, "set_reshard_after_forward")


def run_whole(model: Any, batch: Tensor) -> None:
    """Run a batch through every module of the model, for hooks; the head sees one position."""

    def keep_one(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        return (hidden[:1, :1], *rest)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_one)
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        hook.remove()


def no_gradients(model: nn.Module) -> Any:
    """Inference mode; no_grad for a model in training, which may keep tensors of the pass.

    Gathered weights of a sharded model are such tensors.
    """
    return torch.no_grad() if model.training or is_sharded(model) else torch.inference_mode()
