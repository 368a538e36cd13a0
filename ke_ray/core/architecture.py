"""The parts of a decoder that the measures and resuscitation need, by name.

``ke_ray.models.architectures`` is the table of them; ``ke_ray.studies.architecture`` reads
descriptions of decoders that the table lacks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Architecture:
    """Where a decoder keeps what the measures and resuscitation need.

    Submodules are dotted names relative to the body (``layers``), to a layer, or to its FFN or
    attention module; the empty name is that module itself.

    Attributes:
        model_type: transformers' name of the architecture, in descriptions; the table has it as
            its key.
        layers: the decoder layers, of the body.
        ffn: the FFN, of a layer.
        second_projection: of the FFN; its input is the coefficients.
        up: the first projection, of the FFN.
        gate: the gate's projection, of the FFN; None in an ungated FFN.
        fused: ``up`` and ``gate`` are one projection whose output is [gate | up].
        pre_activation: submodule of the FFN whose input is the gate's pre-activation, where that
            is not the gate's output as it is.
        attention: the attention module, of a layer; in a hybrid, only where it has ``query``.
        query: the projection that makes queries, of the attention module.
        query_rows: which of its rows do: all, the first heads · d_head, or, for each group of
            heads that shares a key, all but the last two blocks of d_head rows (its k and v).
        low_rank_query: the projection that makes queries in its place, where there is one.
        query_norm: the norm of queries, of the attention module; there may be none.
        norm_offset: that norm multiplies by (offset + weight).
        returns_attention: the attention module forms its rows itself and returns them as its
            second output; the others call transformers' attention interface.
        sinks: every attention row gives a share to a sink that is no token.
        alibi: scores carry ALiBi's penalty of distance, whatever the configuration says.
        experts: the module with the fused experts, of the FFN (``models.experts``). A layer whose
            FFN lacks it is an ordinary one.
        shared: an expert that every token goes through, of the FFN; an FFN of the names above.
        shared_gate: the projection whose sigmoid weighs the shared expert, of the FFN.
        up_offset: what is added to an expert's up projection: coefficients = act(gate) · (up + it).
        hybrid: a layer may lack attention or FFN.
        shares_prefixes: a row may hold several sequences with a common beginning, told apart by a
            mask and by positions (``evaluation.spans``). Not where a layer also mixes tokens in
            their order (convolution, linear attention, state space) or where positions are not
            given but counted.
        logit_multiplier: key of the configuration by which logits are multiplied.
        logit_divisor: key of the configuration by which logits are divided.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # for descriptions

    model_type: str = ""
    layers: str = "layers"
    ffn: str = "mlp"
    second_projection: str = "down_proj"
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    fused: Literal["gate_up"] | None = None
    pre_activation: str | None = None
    attention: str = "self_attn"
    query: str = "q_proj"
    query_rows: Literal["all", "first", "grouped"] = "all"
    low_rank_query: str | None = None
    query_norm: str = "q_norm"
    norm_offset: float = 0.0
    returns_attention: bool = False
    sinks: bool = False
    alibi: bool = False
    experts: str | None = None
    shared: str | None = None
    shared_gate: str | None = None
    up_offset: float = 0.0
    hybrid: bool = False
    shares_prefixes: bool = True
    logit_multiplier: str | None = None
    logit_divisor: str | None = None

    def described(self) -> dict[str, Any]:
        """The keys that are not at their defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
