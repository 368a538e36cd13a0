"""Resuscitation and its attention control, applied to a model's weights in memory.

    K'_i = u_i K_i,  b'_i = u_i b_i        u: ``core.resuscitation.multipliers`` [n_layers, d_mlp]

Source: Algorithm 1 of arXiv 2410.01380, which scales rows of the *up* projection, not the gate.
The multiplication is done in float64 and rounded once to the weights' dtype.

What is scaled, and what then holds for fixed layer inputs:

=====================================  ======================================================
gated FFN (OLMo, Llama, Gemma, …)      rows of ``up_proj`` and of its bias where it has one:
                                       C̄'_i = u_i C̄_i exactly. The bias goes with its row
                                       because C = act(gate) · (K_i x + b_i)
Phi-3                                  the second half of the fused ``gate_up_proj``; exact too
mixture of experts (OLMoE, …)          the same rows of every expert, the shared one included;
                                       the quantile is over all memories of the layer. Routing
                                       does not see these weights, so it is as exact as in a
                                       gated FFN. gpt-oss has C = act(gate) · (K_i x + b_i + 1)
                                       up to a clamp: b_i + 1 is scaled
ungated FFN (GPT-2, OPT, Apertus, …)   rows (columns of GPT-2's Conv1D) and bias of the first
                                       projection: the *pre-activation* becomes u_i (K_i x + b_i)
                                       exactly, the coefficient only approximately, since GELU
                                       is not linear
=====================================  ======================================================

In layers after the first the inputs change as well, so there everything is approximate.

**Attention temperature** (B.8) divides the scores by τ before the softmax: softmax(s/τ). The factor
is folded into the weights that make the queries (the query norm where there is one, else the query
rows of the projection and their bias), so it survives saving and needs no changed config. Rotary
embedding is linear and commutes with it. Gemma-2 soft-caps its scores afterwards: there the
*uncapped* scores are divided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ke_ray.core.architecture import Architecture
from ke_ray.core.layers import Absence
from ke_ray.core.resuscitation import dead_rows, multipliers, predicted_entropy_nats, select_rows
from ke_ray.errors import UnsupportedArchitectureError, UserError
from ke_ray.models.architectures import check_config
from ke_ray.models.layout import describe
from ke_ray.resuscitation.coefficients import Coefficients
from ke_ray.secrets import redact
from ke_ray.studies.parts import Resuscitation


@dataclass(frozen=True)
class ResuscitationRecord:
    """Source of a resuscitated model's multipliers, and what they predict of its entropy.

    None and empty for the attention control, which scales no memory.

    Attributes:
        coefficients: source of C̄.
        coefficients_verified: whether C̄ was measured on these very weights.
        selected_rows: per layer, rows of the up projection at or below the quantile.
        dead_rows: per layer, those of them whose coefficient is zero; their multiplier is 1.
        entropy_nats: H of C̄ per layer.
        predicted_entropy_nats: H of u · C̄ per layer, with the inputs of every layer held fixed.
    """

    coefficients: str | None = None
    coefficients_verified: bool | None = None
    selected_rows: list[int] = field(default_factory=list)
    dead_rows: list[int] = field(default_factory=list)
    entropy_nats: list[float] = field(default_factory=list)
    predicted_entropy_nats: list[float] = field(default_factory=list)


def resuscitate(
    model: nn.Module, settings: Resuscitation, coefficients: Coefficients | None
) -> ResuscitationRecord:
    """Change a model in place as the settings of a study say.

    Args:
        coefficients: of this model, from ``coefficients_of``; None for the attention control.

    Raises:
        UserError: ratio, factor or control are not valid for this model, or the coefficients are
            those of another shape.
        UnsupportedArchitectureError: the model is not in the table of architectures.
    """
    if coefficients is None:
        apply_attention_temperature(model, settings.factor)
        return ResuscitationRecord()
    mean = torch.from_numpy(coefficients.values)
    rows = scale_memories(
        model,
        mean,
        ratio=settings.ratio,
        factor=settings.factor,
        control=settings.control,
        seed=settings.seed,
    )
    return ResuscitationRecord(
        coefficients=redact(coefficients.source),
        coefficients_verified=coefficients.verified,
        selected_rows=select_rows(mean, settings.ratio).sum(dim=-1).tolist(),
        dead_rows=dead_rows(mean).sum(dim=-1).tolist(),
        entropy_nats=predicted_entropy_nats(mean, torch.ones_like(mean)).tolist(),
        predicted_entropy_nats=predicted_entropy_nats(mean, rows).tolist(),
    )


def scale_memories(
    model: nn.Module,
    mean_coefficients: Tensor,
    *,
    ratio: float,
    factor: float,
    control: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Apply Algorithm 1, or a control that scales memories, to a model in memory.

    Args:
        model: changed in place.
        mean_coefficients: C̄ [n_layers, d_mlp] of this model, from a scan; any scale. NaN beyond
            the memories of a layer that is narrower than the widest.
        ratio, factor, control, seed: as ``core.resuscitation.multipliers``.

    Returns:
        The multipliers applied, float64 [n_layers, d_mlp].

    Raises:
        UserError: a parameter is out of range or the coefficients are those of another shape.
        UnsupportedArchitectureError: the model is not in the table of architectures.
    """
    widths = [layout.d_mlp for layout in describe(model)]
    given = (~mean_coefficients.isnan()).sum(dim=-1).tolist()
    if mean_coefficients.shape != (len(widths), max(widths)) or given != widths:
        sizes = ", ".join(map(str, dict.fromkeys(widths)))
        raise UserError(
            f"the coefficients have shape {tuple(mean_coefficients.shape)}, with values for "
            f"{', '.join(map(str, dict.fromkeys(given)))} memories, but the model has "
            f"{len(widths)} layers of {sizes} memories; give the coefficients that a scan of this "
            "model wrote"
        )
    norms = up_row_norms(model)
    rows = multipliers(
        mean_coefficients, ratio, factor, control=control, seed=seed, up_row_norms=norms
    )
    apply_multipliers(model, rows)
    return rows


def up_row_norms(model: nn.Module) -> Tensor:
    """Euclidean norms of the memory keys, float64 [n_layers, d_mlp] on the CPU (bias left out).

    As wide as the widest layer; 0 where a layer has no memory.
    """
    layers = [
        torch.cat(
            [torch.zeros(0, dtype=torch.float64)]
            + [
                torch.linalg.vector_norm(rows.weight.detach(), dim=1, dtype=torch.float64).cpu()
                for rows in layout.key_rows()
            ]
        )
        for layout in describe(model)
    ]
    return pad_sequence(layers, batch_first=True)


@torch.no_grad()
def apply_multipliers(model: nn.Module, row_multipliers: Tensor) -> None:
    """Scale every layer's memory keys in place (module docstring).

    Args:
        model: changed in place; its dtype and device stay.
        row_multipliers: [n_layers, d_mlp] of the widest layer, finite.

    Raises:
        UserError: the shape is not the model's, or a multiplier is not finite.
    """
    layouts = describe(model)
    expected = (len(layouts), max(layout.d_mlp for layout in layouts))
    if tuple(row_multipliers.shape) != expected:
        raise UserError(
            f"multipliers have shape {tuple(row_multipliers.shape)}; this model needs {expected}"
        )
    if not bool(torch.isfinite(row_multipliers).all()):
        raise UserError("multipliers hold infinite or NaN values; nothing was changed")
    for layout, every in zip(layouts, row_multipliers, strict=True):
        start = 0
        for rows in layout.key_rows():
            stop = start + len(rows.weight)
            factors = every[start:stop].to(rows.weight.device)
            _scale(rows.weight, factors[:, None])
            if rows.bias is not None:
                _scale(rows.bias, factors, rows.bias_offset)
            start = stop


@torch.no_grad()
def apply_attention_temperature(model: nn.Module, temperature: float) -> None:
    """Divide every layer's attention scores by ``temperature`` by scaling the queries' weights.

    Args:
        model: changed in place.
        temperature: τ, above 0; above 1 flattens attention and raises its entropy.

    Raises:
        UserError: the temperature is not a finite number above 0.
        UnsupportedArchitectureError: queries are clipped after the projection (``clip_qkv``), or
            scores carry ALiBi's penalty: no change of weights is a change of temperature.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"attention temperature is {temperature}; expected a number above 0")
    config: Any = model.config
    entry = check_config(config)
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedArchitectureError(
            f"this model clips its queries (clip_qkv={config.clip_qkv}) between projection and "
            "scores, so an attention temperature cannot be written into its weights"
        )
    for layout in describe(model):
        if layout.no_attention_entropy is Absence.ALIBI:
            raise UnsupportedArchitectureError(
                "this model adds ALiBi's penalty of distance to its scores, which stands in no "
                "weight, so an attention temperature cannot be written into its weights"
            )
        if layout.no_attention_entropy is Absence.SINKS:  # logits in the same softmax
            _scale(_sinks(layout.attention), 1.0 / temperature)
        if layout.attention is not None:
            for part, offset in _query_parts(entry, layout.attention, config):
                _scale(part, 1.0 / temperature, offset)


def _sinks(attention: nn.Module | None) -> Tensor:
    sinks = getattr(attention, "sinks", None)
    if not isinstance(sinks, Tensor):
        raise UnsupportedArchitectureError(
            "this model has attention sinks, learned logits beside its scores, but not as a "
            "parameter 'sinks' of its attention, so an attention temperature cannot divide them"
        )
    return sinks


def _query_parts(
    entry: Architecture, attention: nn.Module, config: Any
) -> list[tuple[Tensor, float]]:
    """Views of the weights that scale the queries last, and the offset that is added to each."""
    norm = getattr(attention, entry.query_norm, None)
    if norm is not None and not list(norm.parameters()):
        raise UnsupportedArchitectureError(
            f"{config.model_type} normalises its queries without weights, so an attention "
            "temperature cannot be written into its weights"
        )
    if norm is not None:  # one, or (StableLM) one for each head
        return [
            (parameter, entry.norm_offset if name.endswith("weight") else 0.0)
            for name, parameter in norm.named_parameters()
        ]
    low_rank = getattr(attention, entry.low_rank_query or "", None)
    projection = attention.get_submodule(entry.query) if low_rank is None else low_rank
    weight = projection.weight
    assert isinstance(weight, Tensor)
    if not hasattr(projection, "in_features"):  # Conv1D stores [in, out]
        weight = weight.t()
    parts = [(_query_rows(entry, weight, config), 0.0)]
    bias = getattr(projection, "bias", None)
    return parts if bias is None else [*parts, (_query_rows(entry, bias, config), 0.0)]


def _query_rows(entry: Architecture, rows: Tensor, config: Any) -> Tensor:
    """The rows of a (fused) projection that make queries, as a view."""
    if entry.query_rows == "all":
        return rows
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    if entry.query_rows == "first":
        return rows[: heads * d_head]
    groups = (rows.shape[0] // d_head - heads) // 2  # as many as there are keys, and values
    return rows.view(groups, heads // groups + 2, d_head, *rows.shape[1:])[:, :-2]


def _scale(target: Tensor, factor: Tensor | float, offset: float = 0.0) -> None:
    """target ← (target + offset) · factor − offset, in float64, rounded once."""
    target.copy_((target.double() + offset) * factor - offset)
