"""A model that is being trained: the part of it that can be measured, left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.sharded import reshard, shards


def bare_model(model: Any) -> Any:
    """The model of transformers inside a live one, whatever is around it.

    Around it may be DistributedDataParallel, ``torch.compile``, an adapter, a LightningModule or a
    module of your own.

    Raises:
        UnsupportedArchitectureError: there is none or more than one, its weights are not all at
            hand in a forward pass of its own, or an adapter changes what it reads.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = list(dict.fromkeys(_outermost(model))) if modules else []
    if len(found) != 1:
        kinds = " and ".join(type(each).__name__ for each in found) or "no model of transformers"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} holds {kinds}; expected exactly one model of transformers. "
            "Give the model that is to be measured."
        )
    (bare,) = found
    if problem := _problem(bare, modules):
        raise UnsupportedArchitectureError(f"{type(bare).__name__} {problem}.")
    return bare


def _problem(bare: nn.Module, modules: list[nn.Module]) -> str | None:
    """What keeps a forward pass of its own from being the model's, and the remedy."""
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in modules):
        return "is sharded by FSDP1; use FSDP2 (fully_shard; of Trainer, fsdp_config version 2)"
    sharded = [each for each in modules if shards(each)]
    if sharded and sharded[0] is not bare:
        return "is not the outermost sharded module; call fully_shard on its layers, then on it"
    if any(_is_split(each, bool(sharded)) for each in bare.parameters()):
        return (
            "has weights that are divided within layers (tensor parallelism) or kept elsewhere "
            "(DeepSpeed ZeRO-3); to measure it, train with DDP, FSDP2, or ZeRO-1 or 2"
        )
    if any(_learns_prompts(each) for each in modules):
        return "reads learned prompts before D (PEFT); only adapters of weights can be measured"
    return None


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


def _is_split(parameter: Any, is_sharded: bool) -> bool:
    """Whether this worker has a part of it only, which FSDP does not gather."""
    if hasattr(parameter, "placements"):  # a DTensor, whose import takes a second
        return sum(each.is_shard() for each in parameter.placements) > is_sharded
    return parameter.numel() == 0


def _learns_prompts(module: Any) -> bool:
    return bool(getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without compiled code; the mode of every module and shards come back.

    Code that was compiled before does not call hooks that came later.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        if any(_is_compiled(module) for module, _ in modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            reshard(model)


def _is_compiled(module: Any) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
