"""The table of decoder architectures, and the memories of a model's layers.

A feed-forward layer is FFN(x) = f(x Kᵀ) V. Its *memory coefficients* f(x Kᵀ) are, in every
decoder, the input of the FFN's second projection (docs/science.md#memory-coefficients). The table
names, per ``model_type`` of transformers, that projection, the first projection (``up``: the rows
that resuscitation scales), the gate (``None`` in an ungated FFN) and the attention module.

=============  ==========================================================================
gated          coefficients = act(gate(x)) · up(x)    (SwiGLU, GeGLU)
ungated        coefficients = act(up(x))              (GPT-2, OPT, Apertus' xIELU, ReLU²)
=============  ==========================================================================

In a mixture of experts ``experts`` names the module that holds them as fused tensors, ``shared``
the expert that every token goes through, ``shared_gate`` what weighs it (``models.experts``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ke_ray.core.architecture import Architecture
from ke_ray.errors import UnsupportedArchitectureError, nearest

_GATED = Architecture()
_UNGATED = Architecture(gate=None)
_GEMMA = Architecture(norm_offset=1.0)  # Gemma's RMSNorm multiplies by (1 + weight)
_COHERE = Architecture(logit_multiplier="logit_scale")
_MIXTURE = Architecture(experts="experts")
_DEEPSEEK = Architecture(experts="experts", shared="shared_experts", low_rank_query="q_b_proj")
_QWEN_HYBRID = Architecture(norm_offset=1.0, hybrid=True, shares_prefixes=False)
_FALCON = Architecture(
    layers="h",
    second_projection="dense_4h_to_h",
    up="dense_h_to_4h",
    gate=None,
    attention="self_attention",
    query="query_key_value",
    query_rows="grouped",
    returns_attention=True,
    shares_prefixes=False,
)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        (
            *("olmo", "olmo2", "olmo3", "llama", "mistral", "qwen2", "qwen3"),
            *("smollm3", "exaone4", "helium"),
        ),
        _GATED,
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
    "gemma3n_text": Architecture(pre_activation="act_fn"),  # thins out the gate's output first
    **dict.fromkeys(("apertus", "arcee", "nemotron"), _UNGATED),  # xIELU, ReLU², ReLU²
    "stablelm": Architecture(query_norm="q_layernorm"),
    "granite": Architecture(logit_divisor="logits_scaling"),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), _QWEN_HYBRID),
    "olmo_hybrid": Architecture(hybrid=True, shares_prefixes=False),
    "nemotron_h": Architecture(  # a layer is an FFN, attention or a state space
        ffn="mixer", gate=None, attention="mixer", hybrid=True, shares_prefixes=False
    ),
    "lfm2": Architecture(
        ffn="feed_forward",
        second_projection="w2",
        up="w3",
        gate="w1",
        query_norm="q_layernorm",
        hybrid=True,
        shares_prefixes=False,
    ),
    "falcon_h1": Architecture(
        ffn="feed_forward",
        pre_activation="act_fn",
        shares_prefixes=False,
        logit_multiplier="lm_head_multiplier",
    ),
    "phi3": Architecture(
        up="gate_up_proj",  # [2·d_mlp, d_model]: first half gate, second half up
        gate="gate_up_proj",
        fused="gate_up",
        query="qkv_proj",
        query_rows="first",
    ),
    "openelm": Architecture(
        ffn="ffn",
        second_projection="proj_2",
        up="proj_1",
        gate="proj_1",
        fused="gate_up",
        attention="attn",
        query="qkv_proj",
        query_rows="first",
    ),
    "nanochat": Architecture(second_projection="fc2", up="fc1", gate=None),
    "phi": Architecture(second_projection="fc2", up="fc1", gate=None, query_norm="q_layernorm"),
    "opt": Architecture(
        layers="decoder.layers", ffn="", second_projection="fc2", up="fc1", gate=None
    ),
    "starcoder2": Architecture(second_projection="c_proj", up="c_fc", gate=None),
    "gpt_neox": Architecture(
        second_projection="dense_4h_to_h",
        up="dense_h_to_4h",
        gate=None,
        attention="attention",
        query="query_key_value",  # rows: for each head its q, k and v in turn
        query_rows="grouped",
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
    "gpt_neo": Architecture(
        layers="h",
        second_projection="c_proj",
        up="c_fc",
        gate=None,
        attention="attn.attention",
        returns_attention=True,
        shares_prefixes=False,
    ),
    "gptj": Architecture(
        layers="h",
        second_projection="fc_out",
        up="fc_in",
        gate=None,
        attention="attn",
        returns_attention=True,
        shares_prefixes=False,
    ),
    "falcon": _FALCON,
    "bloom": replace(_FALCON, alibi=True),
    "mpt": Architecture(
        layers="blocks",
        ffn="ffn",
        gate=None,
        attention="attn",
        query="Wqkv",
        query_rows="first",
        returns_attention=True,
        alibi=True,
        shares_prefixes=False,
    ),
}

ARCHITECTURES |= {
    **dict.fromkeys(("olmoe", "mixtral", "qwen3_moe"), _MIXTURE),
    "qwen2_moe": replace(_MIXTURE, shared="shared_expert", shared_gate="shared_expert_gate"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "gpt_oss": replace(_MIXTURE, up_offset=1.0, sinks=True),
}

# Descriptions that this process was given, by model_type.
_DESCRIBED: dict[str, Architecture] = {}

_MIXTURE_SIGNS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "moe_num_experts",
    "num_experts_per_tok",
)

# Families that users try, and why no entry in the table could make them measurable.
_UNMEASURABLE: dict[str, str] = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "xlstm"),
        "a state-space or recurrent model: its layers have no feed-forward part and no attention, "
        "so it has no memory coefficients",
    ),
    **dict.fromkeys(
        ("rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2"),
        "a recurrent model or a hybrid whose layers are not described in ke_ray's table (hybrids "
        "like LFM2 and Falcon-H1 are)",
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
            *("qwen3_vl", "paligemma", "idefics3", "mistral3", "phi4_multimodal", "lfm2_vl"),
        ),
        "a model of several modalities; save its text decoder (its language_model with the LM "
        "head) as a checkpoint of its own, which is measured if its type is supported",
    ),
}


def use_description(description: Architecture | None) -> None:
    """Use a user's description in this process, in place of the table's row of its model type.

    Every process that loads checkpoints of a study calls it, with what the study says.
    """
    if description is not None:
        _DESCRIBED[description.model_type] = description


def can_share_prefixes(model_type: str) -> bool:
    """``Architecture.shares_prefixes``; False for what is not in the table as it stands."""
    entry = ARCHITECTURES.get(model_type)
    return entry is not None and entry.shares_prefixes and model_type not in _DESCRIBED


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
    entry = _DESCRIBED.get(model_type) or ARCHITECTURES.get(model_type)
    if _has_experts(config, model_type) and not (entry and entry.experts):
        mixtures = [name for name in supported_model_types() if ARCHITECTURES[name].experts]
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is a mixture of experts that ke_ray does not know: it has "
            "to know which module holds the experts, and which are shared by all tokens. Supported "
            f"mixtures: {', '.join(mixtures)}; describe others with --architecture FILE (experts, "
            f"shared, shared_gate). All that is supported: {supported}."
        )
    if entry is None:
        check_measurable(model_type)
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is not known to ke_ray, which has to know where a model "
            f"keeps its feed-forward coefficients. Supported: {supported}. `ke-ray checkpoints "
            "SPEC --explain` shows its modules; describe them with --architecture FILE."
            + nearest(model_type, ARCHITECTURES, cutoff=0.8)
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedArchitectureError(
            f"this '{model_type}' model attends in both directions; the measures are defined for "
            "causal decoders. Give a causal checkpoint."
        )
    return entry


def _has_experts(config: Any, model_type: str) -> bool:
    """Whether a layer is a mixture; dense models' configurations may have sizes of experts too."""
    if getattr(config, "num_experts", None) == 0:
        return False
    if model_type == "nemotron_h" and "moe" not in getattr(config, "layers_block_type", ["moe"]):
        return False
    return any((getattr(config, sign, None) or 0) for sign in _MIXTURE_SIGNS)


def check_measurable(model_type: str) -> None:
    """Raise UnsupportedArchitectureError for families of which no entry could be made."""
    if model_type in _UNMEASURABLE:
        raise UnsupportedArchitectureError(
            f"model type '{model_type}' is {_UNMEASURABLE[model_type]}. Supported: "
            f"{', '.join(supported_model_types())}."
        )


def is_mixture(config: Any) -> bool:
    """Whether layers of this config have experts; False where there is no config."""
    return config is not None and check_config(config).experts is not None


def lacks_head(config: Any) -> bool:
    """Whether a config says that its checkpoint is a base model without language-model head.

    Such a config names only classes like ``LlamaModel`` and does not tie the head to the
    embedding. A config that says nothing is taken for a language model's.
    """
    classes = [str(name) for name in getattr(config, "architectures", None) or []]
    is_base = all(name.endswith("Model") and not name.endswith("HeadModel") for name in classes)
    return bool(classes) and is_base and not getattr(config, "tie_word_embeddings", True)
