"""The table of decoder architectures, and the memories of a model's layers.

A feed-forward layer is FFN(x) = f(x Kᵀ) V. Its *memory coefficients* f(x Kᵀ) are, in every
decoder, the input of the FFN's second projection (docs/science.md#memory-coefficients). The table
names, per ``model_type`` of transformers, that projection, the first projection (``up``: the rows
that resuscitation scales), the gate (``None`` in an ungated FFN) and the attention module.

=============  ==========================================================================
gated          coefficients = act(gate(x)) · up(x)    (SwiGLU, GeGLU)
ungated        coefficients = act(up(x))              (GPT-2, GPT-NeoX, Phi)
=============  ==========================================================================

In a mixture of experts ``experts`` names the module that holds them as fused tensors, ``shared``
the expert that every token goes through, ``shared_gate`` what weighs it (``models.experts``). A
layer without such a module is an ordinary FFN of the other names (DeepSeek's first layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ke_ray.errors import UnsupportedArchitectureError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ke_ray.models.experts import MixtureLayout


@dataclass(frozen=True)
class Architecture:
    """Names of submodules, relative to the body (``layers``), a layer, or its attention."""

    layers: str = "layers"
    ffn: str = "mlp"
    second_projection: str = "down_proj"
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    fused: Literal["gate_up"] | None = None
    attention: str = "self_attn"
    query: str = "q_proj"
    query_rows: Literal["all", "first", "per_head"] = "all"
    query_norm: str = "q_norm"
    low_rank_query: str | None = None  # in the place of ``query`` where the layer has it
    norm_offset: float = 0.0  # Gemma's RMSNorm multiplies by (1 + weight)
    experts: str | None = None
    shared: str | None = None
    shared_gate: str | None = None
    up_offset: float = 0.0  # gpt-oss: coefficients = act(gate) · (up + 1)


_GATED = Architecture()
_GEMMA = Architecture(norm_offset=1.0)
_MIXTURE = Architecture(experts="experts")
_DEEPSEEK = Architecture(experts="experts", shared="shared_experts", low_rank_query="q_b_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "olmo": _GATED,
    "olmo2": _GATED,
    "olmo3": _GATED,
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Architecture(
        up="gate_up_proj",  # [2·d_mlp, d_model]: first half gate, second half up
        gate="gate_up_proj",
        fused="gate_up",
        query="qkv_proj",
        query_rows="first",
    ),
    "phi": Architecture(second_projection="fc2", up="fc1", gate=None, query_norm="q_layernorm"),
    "gpt_neox": Architecture(
        second_projection="dense_4h_to_h",
        up="dense_h_to_4h",
        gate=None,
        attention="attention",
        query="query_key_value",  # rows: for each head its q, k and v in turn
        query_rows="per_head",
    ),
    "gpt2": Architecture(
        layers="h",
        second_projection="c_proj",
        up="c_fc",
        gate=None,
        attention="attn",
        query="c_attn",
        query_rows="first",
    ),
    "olmoe": _MIXTURE,
    "mixtral": _MIXTURE,
    "qwen2_moe": Architecture(
        experts="experts", shared="shared_expert", shared_gate="shared_expert_gate"
    ),
    "qwen3_moe": _MIXTURE,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": Architecture(experts="experts", up_offset=1.0),
}

_MIXTURE_SIGNS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "moe_num_experts",
    "num_experts_per_tok",
)

# Families that users try, and why no entry in the table could make them measurable.
_UNMEASURABLE = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "xlstm"),
        "a state-space or recurrent model: its layers have no feed-forward part and no attention, "
        "so it has no memory coefficients",
    ),
    **dict.fromkeys(
        ("rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2", "nemotron_h"),
        "a recurrent model or a hybrid with one: not every layer has the feed-forward part and "
        "the attention that the measures are defined for",
    ),
    **dict.fromkeys(
        (
            *("bert", "roberta", "xlm-roberta", "distilbert", "albert", "deberta-v2", "electra"),
            *("modernbert", "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper"),
        ),
        "an encoder or an encoder-decoder: the measures are defined for causal decoders",
    ),
    **dict.fromkeys(
        (
            *("gemma3", "gemma3n", "llava", "mllama", "llama4", "qwen2_vl", "qwen2_5_vl"),
            *("qwen3_vl", "paligemma", "idefics3", "mistral3"),
        ),
        "a model of several modalities; save its text decoder (its language_model with the LM "
        "head) as a checkpoint of its own, which is measured if its type is supported",
    ),
}


class KeyRows(NamedTuple):
    """Some memory keys, as views of the model's own storage.

    ``bias_offset`` is a constant that the model adds to the bias (gpt-oss: 1).
    """

    weight: torch.Tensor  # [rows, d_model]
    bias: torch.Tensor | None  # [rows]
    bias_offset: float = 0.0


@dataclass(frozen=True)
class FFNLayout:
    """The parts of one decoder layer that the measures and resuscitation need.

    Attributes:
        second_projection: its input is the coefficients [batch, pos, d_mlp].
        up: the first projection; with ``fused == "gate_up"`` its output is [gate | up].
        gate: the gate's projection, ``None`` for an ungated FFN (the same module as ``up``
            when fused).
        attention: the attention module of the layer.
        d_mlp: number of memories.
        activation: name of the activation in the config, such as ``silu``.
        transposed: weights are stored [in, out] (GPT-2's Conv1D).
    """

    second_projection: nn.Module
    up: nn.Module
    gate: nn.Module | None
    attention: nn.Module
    fused: Literal["gate_up"] | None
    d_mlp: int
    activation: str
    transposed: bool

    @property
    def gated(self) -> bool:
        """Whether coefficients are a product of a gate and ``up``."""
        return self.gate is not None

    @property
    def expert_sizes(self) -> tuple[int, ...]:
        """A dense FFN is one expert."""
        return (self.d_mlp,)

    def key_rows(self) -> Iterator[KeyRows]:
        """The memory keys in the order of the coefficients; here all at once."""
        yield KeyRows(self.up_weight(), self.up_bias())

    def up_weight(self) -> torch.Tensor:
        """The memory keys K as a view [d_mlp, d_model] of the model's own storage."""
        weight: Any = self.up.weight
        rows = weight.t() if self.transposed else weight
        return rows[self.d_mlp :] if self.fused == "gate_up" else rows

    def up_bias(self) -> torch.Tensor | None:
        """The bias of the memory keys as a view [d_mlp], or ``None``."""
        bias = getattr(self.up, "bias", None)
        if bias is None:
            return None
        return bias[self.d_mlp :] if self.fused == "gate_up" else bias


def supported_model_types() -> tuple[str, ...]:
    """``model_type`` of every architecture in the table, sorted."""
    return tuple(sorted(ARCHITECTURES))


def check_config(config: Any) -> Architecture:
    """The table's entry for a transformers config; needs no weights.

    Args:
        config: a ``PreTrainedConfig`` (anything with ``model_type``).

    Raises:
        UnsupportedArchitectureError: for bidirectional attention, or an architecture that is not
            in the table; the message names what is supported.
    """
    model_type = str(getattr(config, "model_type", "") or "")
    supported = ", ".join(supported_model_types())
    entry = ARCHITECTURES.get(model_type)
    if (entry is None or entry.experts is None) and any(
        (getattr(config, sign, None) or 0) for sign in _MIXTURE_SIGNS
    ):
        mixtures = sorted(name for name, row in ARCHITECTURES.items() if row.experts is not None)
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is a mixture of experts that ke_ray does not know: it has "
            "to know which module holds the fused experts, and whether others are shared by all "
            f"tokens. Supported mixtures: {', '.join(mixtures)}; dense decoders: "
            f"{', '.join(name for name in supported_model_types() if name not in mixtures)}."
        )
    if model_type in _UNMEASURABLE:
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is {_UNMEASURABLE[model_type]}. Supported: {supported}."
        )
    if entry is None:
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is not known to ke_ray, which has to know where a model "
            f"keeps its feed-forward coefficients. Supported: {supported}."
            + nearest(model_type, ARCHITECTURES, cutoff=0.8)
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedArchitectureError(
            f"this '{model_type}' model attends in both directions; the measures are defined for "
            "causal decoders. Give a causal checkpoint."
        )
    return entry


def is_mixture(config: Any) -> bool:
    """Whether the layers of a supported config have experts."""
    entry = ARCHITECTURES.get(str(getattr(config, "model_type", "")))
    return entry is not None and entry.experts is not None


def lacks_head(config: Any) -> bool:
    """Whether a config says that its checkpoint is a base model without language-model head.

    Such a config names only classes like ``LlamaModel`` and does not tie the head to the
    embedding. A config that says nothing is taken for a language model's.
    """
    classes = [str(name) for name in getattr(config, "architectures", None) or []]
    is_base = all(name.endswith("Model") and not name.endswith("HeadModel") for name in classes)
    return bool(classes) and is_base and not getattr(config, "tie_word_embeddings", True)


def describe(model: nn.Module) -> tuple[FFNLayout | MixtureLayout, ...]:
    """Where a loaded model keeps its memories, layer by layer.

    Args:
        model: a causal language model of transformers, or its bare body.

    Returns:
        One layout per layer, in the order of the forward pass.

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


def _layout(entry: Architecture, layer: nn.Module, config: Any) -> FFNLayout | MixtureLayout:
    ffn = layer.get_submodule(entry.ffn)
    attention = layer.get_submodule(entry.attention)
    if entry.experts is None or not hasattr(ffn, entry.experts):
        return _ffn_layout(entry, ffn, attention, config)
    from ke_ray.models.experts import MixtureLayout  # needs torch, which a config does not

    shared = None if entry.shared is None else ffn.get_submodule(entry.shared)
    return MixtureLayout(
        ffn=ffn,
        experts=ffn.get_submodule(entry.experts),
        shared=None if shared is None else _ffn_layout(entry, shared, attention, config),
        shared_gate=None if entry.shared_gate is None else ffn.get_submodule(entry.shared_gate),
        attention=attention,
        up_offset=entry.up_offset,
    )


def _ffn_layout(
    entry: Architecture, ffn: nn.Module, attention: nn.Module, config: Any
) -> FFNLayout:
    second = ffn.get_submodule(entry.second_projection)
    weight: Any = second.weight
    transposed = not hasattr(second, "in_features")  # Conv1D has nx/nf and stores [in, out]
    activation = next(
        (
            str(value)
            for name in ("hidden_activation", "hidden_act", "activation_function")
            if (value := getattr(config, name, None)) is not None
        ),
        "",
    )
    return FFNLayout(
        second_projection=second,
        up=ffn.get_submodule(entry.up),
        gate=None if entry.gate is None else ffn.get_submodule(entry.gate),
        attention=attention,
        fused=entry.fused,
        d_mlp=weight.shape[0] if transposed else weight.shape[1],
        activation=activation,
        transposed=transposed,
    )
