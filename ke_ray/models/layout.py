"""The memories of a loaded model's layers: what the table of architectures names, as modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ke_ray.core.architecture import Architecture
from ke_ray.core.layers import Absence, Layers
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.architectures import check_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn


class KeyRows(NamedTuple):
    """Some memory keys, as views of the model's own storage.

    ``bias_offset`` is a constant that the model adds to the bias (gpt-oss: 1).
    """

    weight: torch.Tensor  # [rows, d_model]
    bias: torch.Tensor | None  # [rows]
    bias_offset: float = 0.0


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer, and what weighs its shared expert.

    Attributes:
        block: the whole FFN: router, experts and shared expert.
        module: transformers' experts, with the fused tensors ``gate_up_proj`` and ``down_proj``.
        shared_gate: the projection [1, d_model] whose sigmoid weighs the shared expert; None:
            weight one, or no shared expert.
        up_offset: what the model adds to the up projection's output.
    """

    block: nn.Module
    module: nn.Module
    shared_gate: nn.Module | None
    up_offset: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Memories of each expert."""
        down: Any = self.module.down_proj  # [experts, d_model, m], or [experts, m, d_model]
        return (int(down.shape[1 if self.module.is_transposed else 2]),) * len(down)

    def key_rows(self) -> Iterator[KeyRows]:
        """The memory keys, expert by expert."""
        module: Any = self.module
        for expert in range(len(module.down_proj)):
            weight = module.gate_up_proj[expert]
            rows = self._up(weight.t() if module.is_transposed else weight)
            bias = self._up(module.gate_up_proj_bias[expert]) if module.has_bias else None
            yield KeyRows(rows, bias, self.up_offset)

    def gate_and_up(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors [tokens, m] of an expert's coefficients, the gate before its activation.

        Args:
            gate_up: [tokens, 2·m], output of an expert's first projection.
        """
        halves = gate_up.t()
        gate = halves[: len(halves) // 2] if self.module.is_concatenated else halves[::2]
        up = self._up(halves)
        limit: Any = getattr(self.module, "limit", None)  # gpt-oss clamps both
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate.t(), up.t() + self.up_offset

    def _up(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[len(rows) // 2 :] if self.module.is_concatenated else rows[1::2]


@dataclass(frozen=True)
class FFNLayout:
    """The parts of one decoder layer that the measures and resuscitation need.

    In a mixture of experts the FFN is the shared expert, whose memories come after those of the
    routed ones.

    Attributes:
        second_projection: its input is the coefficients [batch, pos, d_mlp]; None in a layer
            without FFN, which has no ``up`` and no ``gate`` either.
        up: the first projection; with ``fused == "gate_up"`` its output is [gate | up].
        gate: the gate's projection, None for an ungated FFN (the same module as ``up``
            when fused).
        pre_activation: module whose input is the gate's pre-activation; None where that is the
            gate's output.
        attention: the attention module of the layer; None where it has none.
        no_attention_entropy: why attention entropy has no meaning here.
        returns_attention: the attention module returns its rows.
        d_dense: number of memories of the FFN, 0 without.
        activation: name of the activation in the config, such as ``silu``; empty where it has none.
        transposed: weights are stored [in, out] (GPT-2's Conv1D).
        experts: the routed experts; None in a dense layer.
    """

    second_projection: nn.Module | None
    up: nn.Module | None
    gate: nn.Module | None
    pre_activation: nn.Module | None
    attention: nn.Module | None
    no_attention_entropy: Absence
    returns_attention: bool
    fused: Literal["gate_up"] | None
    d_dense: int
    activation: str
    transposed: bool
    experts: Experts | None = None

    @property
    def expert_sizes(self) -> tuple[int, ...]:
        """Memories of each expert, a shared one last; a dense layer is one expert."""
        if self.experts is None:
            return (self.d_dense,)
        return self.experts.sizes + ((self.d_dense,) if self.d_dense else ())

    @property
    def d_mlp(self) -> int:
        """Number of memories of the layer, 0 without any."""
        return sum(self.expert_sizes)

    @property
    def gated(self) -> bool:
        """Whether coefficients are a product of a gate and ``up``."""
        return self.gate is not None

    def key_rows(self) -> Iterator[KeyRows]:
        """The memory keys of the layer, in the order of the coefficients."""
        if self.experts is not None:
            yield from self.experts.key_rows()
        if self.up is not None:
            yield KeyRows(self.up_weight(), self.up_bias())

    def up_weight(self) -> torch.Tensor:
        """The memory keys K of the FFN as a view [d_dense, d_model] of the model's own storage."""
        assert self.up is not None, "the layer has no FFN"
        weight: Any = self.up.weight
        rows = weight.t() if self.transposed else weight
        return rows[self.d_dense :] if self.fused == "gate_up" else rows

    def up_bias(self) -> torch.Tensor | None:
        """The bias of the memory keys as a view [d_dense], or ``None``."""
        bias: Any = getattr(self.up, "bias", None)
        if bias is None:
            return None
        return bias[self.d_dense :] if self.fused == "gate_up" else bias


def describe(model: nn.Module) -> tuple[FFNLayout, ...]:
    """Where a loaded model keeps its memories, layer by layer.

    Args:
        model: a causal language model of transformers, or its bare body.

    Returns:
        One ``FFNLayout`` per layer, in the order of the forward pass.

    Raises:
        UnsupportedArchitectureError: as ``check_config``, or when the modules are not where the
            table says (a modelling code of another version, or weights replaced by adapters).
    """
    config = getattr(model, "config", None)
    entry = check_config(config)
    body = getattr(model, "base_model", model)
    try:
        layers = body.get_submodule(entry.layers)
        return tuple(_layout(entry, layer, config) for layer in layers.children())
    except AttributeError as error:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} says it is '{getattr(config, 'model_type', '')}' but is not "
            f"built like it: {error}. Supported are the unmodified classes of transformers."
        ) from error


def layers_of(layouts: Sequence[FFNLayout]) -> Layers:
    """Sizes of the layers and what they lack, for sums and values."""
    return Layers.of(
        [layout.d_mlp for layout in layouts],
        [layout.no_attention_entropy for layout in layouts],
        [layout.expert_sizes for layout in layouts],
    )


def _layout(entry: Architecture, layer: nn.Module, config: Any) -> FFNLayout:
    ffn = _part(entry, layer, entry.ffn)
    experts = _experts(entry, ffn)
    if experts is not None:
        ffn = None if entry.shared is None else experts.block.get_submodule(entry.shared)
    second = None if ffn is None else _part(entry, ffn, entry.second_projection)
    attention = _part(entry, layer, entry.attention)
    if entry.hybrid and attention is not None and _part(entry, attention, entry.query) is None:
        attention = None
    weight: Any = None if second is None else second.weight
    # Conv1D has nx and nf, and stores [in, out].
    transposed = second is not None and not hasattr(second, "in_features")
    d_dense = 0 if weight is None else int(weight.shape[0] if transposed else weight.shape[1])
    absence = Absence.NONE
    if attention is None:
        absence = Absence.NO_ATTENTION
    elif entry.alibi or getattr(config, "alibi", False):
        absence = Absence.ALIBI
    elif entry.sinks:
        absence = Absence.SINKS

    def of_ffn(name: str | None) -> nn.Module | None:
        return None if name is None or ffn is None or second is None else ffn.get_submodule(name)

    return FFNLayout(
        second_projection=second,
        up=of_ffn(entry.up),
        gate=of_ffn(entry.gate),
        pre_activation=of_ffn(entry.pre_activation),
        attention=attention,
        no_attention_entropy=absence,
        returns_attention=entry.returns_attention,
        fused=entry.fused,
        d_dense=d_dense,
        activation=_activation(config),
        transposed=transposed,
        experts=experts,
    )


def _experts(entry: Architecture, ffn: nn.Module | None) -> Experts | None:
    if ffn is None or entry.experts is None or not hasattr(ffn, entry.experts):
        return None
    module = ffn.get_submodule(entry.experts)
    # What transformers' interface says of its experts; other modules say nothing.
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", True):
        raise AttributeError(
            f"{type(module).__name__} does not hold gated experts of transformers' interface for "
            "them, without a norm behind"
        )
    gate = None if entry.shared_gate is None else ffn.get_submodule(entry.shared_gate)
    return Experts(ffn, module, gate, entry.up_offset)


def _part(entry: Architecture, module: nn.Module, name: str) -> nn.Module | None:
    """A submodule; None where it is absent and the layers of this architecture may lack parts."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        if entry.hybrid:
            return None
        raise


def _activation(config: Any) -> str:
    names = (
        "hidden_activation",
        "hidden_act",
        "mlp_hidden_act",
        "activation_function",
        "activation",
    )
    values = (getattr(config, name, None) for name in names)
    return next((str(value) for value in values if value is not None), "")
