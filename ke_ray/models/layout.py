"""The memories of a loaded model's layers: what the table of architectures names, as modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ke_ray.core.architecture import Architecture
from ke_ray.core.layers import Absence, Layers
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.architectures import check_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn


@dataclass(frozen=True)
class FFNLayout:
    """The parts of one decoder layer that the measures and resuscitation need.

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
        d_mlp: number of memories, 0 without FFN.
        activation: name of the activation in the config, such as ``silu``; empty where it has none.
        transposed: weights are stored [in, out] (GPT-2's Conv1D).
    """

    second_projection: nn.Module | None
    up: nn.Module | None
    gate: nn.Module | None
    pre_activation: nn.Module | None
    attention: nn.Module | None
    no_attention_entropy: Absence
    returns_attention: bool
    fused: Literal["gate_up"] | None
    d_mlp: int
    activation: str
    transposed: bool

    @property
    def gated(self) -> bool:
        """Whether coefficients are a product of a gate and ``up``."""
        return self.gate is not None

    def up_weight(self) -> torch.Tensor:
        """The memory keys K as a view [d_mlp, d_model] of the model's own storage."""
        assert self.up is not None, "the layer has no FFN"
        weight: Any = self.up.weight
        rows = weight.t() if self.transposed else weight
        return rows[self.d_mlp :] if self.fused == "gate_up" else rows

    def up_bias(self) -> torch.Tensor | None:
        """The bias of the memory keys as a view [d_mlp], or ``None``."""
        bias: Any = getattr(self.up, "bias", None)
        if bias is None:
            return None
        return bias[self.d_mlp :] if self.fused == "gate_up" else bias


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
    )


def _layout(entry: Architecture, layer: nn.Module, config: Any) -> FFNLayout:
    ffn = _part(entry, layer, entry.ffn)
    second = None if ffn is None else _part(entry, ffn, entry.second_projection)
    attention = _part(entry, layer, entry.attention)
    if entry.hybrid and attention is not None and _part(entry, attention, entry.query) is None:
        attention = None
    weight: Any = None if second is None else second.weight
    # Conv1D has nx and nf, and stores [in, out].
    transposed = second is not None and not hasattr(second, "in_features")
    d_mlp = 0 if weight is None else int(weight.shape[0] if transposed else weight.shape[1])
    absence = Absence.NONE
    if attention is None:
        absence = Absence.NO_ATTENTION
    elif entry.alibi or getattr(config, "alibi", False):
        absence = Absence.ALIBI

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
        d_mlp=d_mlp,
        activation=_activation(config),
        transposed=transposed,
    )


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
