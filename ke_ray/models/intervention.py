"""The loss of a model while it is changed, beside its own (`core.intervention`).

Both losses are of the same instances in the same batches, so that no change at all gives exactly 0.
Weights are changed in place, one intervention at a time, and their originals wait in host memory:
a copy of the tensors that are changed, so of the whole model for `sensitivity_all`. They are copied
back whatever happens, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ke_ray.core.intervention import INTERVENED, Intervention, add_noise, masked_memories
from ke_ray.core.statistics import GroupSums
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.layout import FFNLayout
from ke_ray.models.sharded import is_sharded


def add_interventions(
    sums: GroupSums,
    interventions: Sequence[Intervention],
    model: Any,
    layouts: Sequence[FFNLayout],
    *,
    losses: Callable[[], Tensor],
    predictions: Tensor,
    instances: Tensor,
    num_seeds: int,
    usage: Tensor | None,
) -> None:
    """Add the rise of the loss of each instance under each intervention.

    Args:
        losses: Σ_t ℓ_t of each instance of the model as it is at the time, float64 [n].
        predictions: [n] tokens that each instance predicts.
        instances: int64 [n] their indices in D.
        num_seeds: draws of noise to average over.
        usage: [n_layers, widest d_mlp] C̄, for masks.

    Raises:
        UnsupportedArchitectureError: a sharded model, or masks of a mixture of experts.
    """
    if is_sharded(model):
        raise UnsupportedArchitectureError(
            "the weights of this model are divided among workers, where no intervention is "
            "possible; save the model and measure it with ke-ray scan"
        )
    if not len(instances):
        return  # drawing noise takes time, whatever it is drawn for
    if INTERVENED in sums.tables:
        sums.add(INTERVENED, instances, predictions)
    before = losses()
    for own in interventions:
        if own.kind == "mask":
            assert usage is not None
            with _masked(layouts, own, usage):
                rise = losses() - before
        else:
            tensors = _tensors(model, layouts, own.target)
            rise = torch.zeros_like(before)
            for seed in range(num_seeds):
                with _noisy(tensors, own.amount, seed):
                    rise += (losses() - before) / num_seeds
        sums.add(own.name, instances, rise)


def _tensors(model: Any, layouts: Sequence[FFNLayout], part: str) -> dict[str, Tensor]:
    """The parameters of a part by name, tied ones once."""
    named = dict(model.named_parameters())
    if part == "all":
        return named
    modules: list[nn.Module | None] = []
    if part == "embeddings":
        modules += [m for m in model.modules() if isinstance(m, nn.Embedding)]
        modules.append(model.get_output_embeddings())
    for layout in layouts if part != "embeddings" else ():
        if part == "attention":
            modules.append(layout.attention)
        else:
            modules += [layout.gate, layout.up, layout.second_projection]
            modules.append(layout.experts.block if layout.experts else None)
    own = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name: parameter for name, parameter in named.items() if id(parameter) in own}


@contextmanager
def _noisy(tensors: Mapping[str, Tensor], gamma: float, seed: int) -> Iterator[None]:
    originals: dict[str, Tensor] = {}
    try:
        for name, parameter in tensors.items():
            originals[name] = parameter.detach().to("cpu", copy=True)
            add_noise(parameter.detach(), gamma, seed=seed, name=name)
        yield
    finally:
        for name, original in originals.items():
            tensors[name].detach().copy_(original)


@contextmanager
def _masked(layouts: Sequence[FFNLayout], own: Intervention, usage: Tensor) -> Iterator[None]:
    with ExitStack() as stack:
        for layout, mean in zip(layouts, usage, strict=True):
            if layout.experts is not None:
                raise UnsupportedArchitectureError(
                    f"{own.measure} zeroes coefficients, which a mixture of experts keeps expert "
                    "by expert; leave it out of the measures"
                )
            if layout.second_projection is None:
                continue
            rows = masked_memories(mean[: layout.d_mlp], own.target, own.amount)

            def zero(
                _module: nn.Module, inputs: tuple[Any, ...], rows: Tensor = rows
            ) -> tuple[Any, ...]:
                return (inputs[0].index_fill(-1, rows, 0), *inputs[1:])

            stack.callback(layout.second_projection.register_forward_pre_hook(zero).remove)
        yield
