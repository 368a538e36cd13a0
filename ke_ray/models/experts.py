"""The memories of a mixture of experts, and what each token draws from them.

transformers keeps the experts of a layer as fused tensors [experts, …] that no hook on a projection
sees, and lets their forward pass be replaced (``experts_implementation``). For the duration of
``measure_experts`` a model uses the implementation registered here under ``ke_ray_experts``:
transformers' own loop over experts, which hands the inside of each expert to a sink. Only one
expert's tokens are in memory at a time: [tokens of the expert, its memories], never [tokens, all
memories]. Padding is not routed at all.

The coefficient of memory i of expert e is g_e · |C_{e,i}| with the router's weight g_e, zero for a
token that is not routed to e (``core.experts``: the definition, which is ours). A shared expert is
the FFN of the layer's layout, with weight one or the sigmoid of ``shared_gate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ke_ray.models.layout import FFNLayout

IMPLEMENTATION = "ke_ray_experts"
_SINK = "_ke_ray_experts_sink"


class RoutedRows(NamedTuple):
    """What one expert computed for the real tokens that are routed to it."""

    expert: int
    tokens: Tensor  # int64 [k] indices into batch · pos, each once
    weights: Tensor  # [k], g_e
    gate_up: Tensor  # [k, 2·m], output of the fused first projection
    coefficients: Tensor  # [k, m], not weighted


class ExpertSink(Protocol):
    """What ``measure_experts`` reports to."""

    def is_real(self) -> Tensor:
        """bool [batch · pos] of the batch under way: padding is not routed."""

    def needs_output(self, layer: int) -> bool:
        """Whether the forward pass goes on behind this layer's experts."""

    def see_expert(self, layer: int, rows: RoutedRows) -> None:
        """Take the rows of one expert; experts without a token are left out."""

    def seen_experts(self, layer: int) -> None:
        """All experts of the layer have been seen; may raise to end the forward pass."""


@contextmanager
def measure_experts(model: Any, layouts: Sequence[FFNLayout], sink: ExpertSink) -> Iterator[None]:
    """Within the context every forward pass hands the inside of its routed experts to ``sink``.

    Args:
        model: a transformers model that ``describe`` accepts.
        layouts: ``describe(model)``; without a mixture among them nothing is done.
    """
    mixtures = {n: layout.experts.module for n, layout in enumerate(layouts) if layout.experts}
    if not mixtures:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    former = model.config._experts_implementation
    for layer, module in mixtures.items():
        setattr(module, _SINK, (sink, layer))
    try:
        model.set_experts_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_experts_implementation(former)
        for module in mixtures.values():
            delattr(module, _SINK)


def _forward(
    module: Any,
    hidden: Tensor,  # [batch · pos, d_model]
    top_k_index: Tensor,  # [batch · pos, k]
    top_k_weights: Tensor,  # [batch · pos, k]
) -> Tensor:
    """transformers' loop over experts; 0 at padding."""
    sink, layer = getattr(module, _SINK)
    num_experts, top_k = len(module.down_proj), top_k_index.shape[1]
    routed = torch.where(sink.is_real()[:, None], top_k_index, num_experts).flatten()
    order = routed.argsort(stable=True)
    counts = routed.bincount(minlength=num_experts + 1).tolist()
    weights = top_k_weights.flatten()
    output = torch.zeros_like(hidden)
    needs_output = sink.needs_output(layer)
    # What is left over in `order` are the places of padding.
    for expert, places in enumerate(order.split(counts)[:num_experts]):
        if not len(places):
            continue
        tokens = places // top_k
        gate_up = _linear(module, "gate_up_proj", expert, hidden[tokens])
        inside = module._apply_gate(gate_up)
        sink.see_expert(layer, RoutedRows(expert, tokens, weights[places], gate_up, inside))
        if needs_output:
            result = _linear(module, "down_proj", expert, inside) * weights[places, None]
            output.index_add_(0, tokens, result.to(output.dtype))
    sink.seen_experts(layer)
    return output


def _linear(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return F.linear(rows, weight.t() if module.is_transposed else weight, bias)
