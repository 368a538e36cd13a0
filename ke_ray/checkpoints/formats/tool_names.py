"""Names of tensors in checkpoints of training tools, and those of transformers for the same.

Each tool's names are a table; ``{i}`` stands for the layer. A tensor that its tool's table lacks is
refused by name: a model with parts that transformers' class does not have would be another model.

==============  ====================================================================================
nanochat        ``model_<step>.pt``, for transformers' NanoChat (not the variants with residual
                scalars or value embeddings)
OLMo-core       norms after attention and feed-forward, for transformers' OLMo-2 and OLMo-3
torchtitan      Llama; rows of queries and keys are in Meta's order (pairs of a rotation beside each
                other), which transformers does not share
Pico            for transformers' Llama (``formats.pico``); rows as in torchtitan
others          transformers' own names, perhaps under the attribute that held the model in a
                LightningModule or a state (``model.``, ``net.``)
==============  ====================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ke_ray.errors import CheckpointError


@dataclass(frozen=True)
class NameTable:
    """The names of one tool.

    Attributes:
        sign: a tensor that every model of the tool has, and no other tool's.
        names: (the tool's name, transformers' name).
        interleaved: endings of transformers' names whose rows are in Meta's order.
    """

    tool: str
    sign: str
    names: tuple[tuple[str, str], ...]
    interleaved: tuple[str, ...] = ()


_LAYER = "model.layers.{i}."
_ATTENTION = f"{_LAYER}self_attn."
_MLP = f"{_LAYER}mlp."
_SWIGLU = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

TABLES = (
    NameTable(
        "nanochat",
        "transformer.h.0.attn.c_q.weight",
        (
            ("transformer.wte.weight", "model.embed_tokens.weight"),
            ("lm_head.weight", "lm_head.weight"),
            *(
                (f"transformer.h.{{i}}.attn.{own}.weight", f"{_ATTENTION}{hf}.weight")
                for own, hf in zip(
                    ("c_q", "c_k", "c_v", "c_proj"),
                    ("q_proj", "k_proj", "v_proj", "o_proj"),
                    strict=True,
                )
            ),
            ("transformer.h.{i}.mlp.c_fc.weight", f"{_MLP}fc1.weight"),
            ("transformer.h.{i}.mlp.c_proj.weight", f"{_MLP}fc2.weight"),
        ),
    ),
    NameTable(
        "OLMo-core",
        "blocks.0.attention.w_q.weight",
        (
            ("embeddings.weight", "model.embed_tokens.weight"),
            ("lm_head.norm.weight", "model.norm.weight"),
            ("lm_head.w_out.weight", "lm_head.weight"),
            *(
                (f"blocks.{{i}}.attention.{own}.weight", f"{_ATTENTION}{hf}.weight")
                for own, hf in zip(
                    ("w_q", "w_k", "w_v", "w_out", "q_norm", "k_norm"),
                    ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
                    strict=True,
                )
            ),
            *(
                (f"blocks.{{i}}.feed_forward.{own}.weight", f"{_MLP}{hf}.weight")
                for own, hf in _SWIGLU
            ),
            ("blocks.{i}.attention_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
            ("blocks.{i}.feed_forward_norm.weight", f"{_LAYER}post_feedforward_layernorm.weight"),
        ),
    ),
    NameTable(
        "torchtitan",
        "tok_embeddings.weight",
        (
            ("tok_embeddings.weight", "model.embed_tokens.weight"),
            ("norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            *(
                (f"layers.{{i}}.attention.{name}.weight", f"{_ATTENTION}{part}_proj.weight")
                for part in "qkvo"
                for name in (f"w{part}", f"qkv_linear.w{part}")
            ),
            *(
                (f"layers.{{i}}.feed_forward.{own}.weight", f"{_MLP}{hf}.weight")
                for own, hf in _SWIGLU
            ),
            ("layers.{i}.attention_norm.weight", f"{_LAYER}input_layernorm.weight"),
            ("layers.{i}.ffn_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
        ),
        interleaved=("q_proj.weight", "k_proj.weight"),
    ),
    NameTable(
        "Pico",
        "embedding_proj.weight",
        (
            ("embedding_proj.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("de_embedding_proj.weight", "lm_head.weight"),
            *(
                (f"layers.{{i}}.attention.{part}_proj.weight", f"{_ATTENTION}{part}_proj.weight")
                for part in "qkvo"
            ),
            *(
                (f"layers.{{i}}.swiglu.{own}.weight", f"{_MLP}{hf}.weight")
                for own, hf in (("w_0", "gate_proj"), ("w_1", "up_proj"), ("w_2", "down_proj"))
            ),
            ("layers.{i}.attention_norm.weight", f"{_LAYER}input_layernorm.weight"),
            ("layers.{i}.swiglu_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
        ),
        interleaved=("q_proj.weight", "k_proj.weight"),
    ),
)
# The attribute that held the model: of a trainer, or of Pico's class for the Hub.
_ATTRIBUTES = re.compile(r"^(model|pico_decoder)\.")
# First parts of transformers' own names.
_BODIES = ("model", "transformer", "gpt_neox", "lm_head", "embed_out")


def transformers_names(names: Iterable[str], origin: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Transformers' name of each tensor, and endings of those whose rows are in Meta's order.

    Args:
        names: of all tensors of a model, as the tool stored them.
        origin: the checkpoint's location, for messages.

    Raises:
        CheckpointError: a tensor is not in the table of its tool.
    """
    stored = list(names)
    without = {name: _ATTRIBUTES.sub("", name) for name in stored}
    table = next((table for table in TABLES if table.sign in without.values()), None)
    if table is None:
        return _without_attribute(stored), ()
    patterns = [
        (re.compile(re.escape(own).replace(r"\{i\}", "([0-9]+)")), hf) for own, hf in table.names
    ]
    result = {}
    for name, short in without.items():
        matches = ((pattern.fullmatch(short), hf) for pattern, hf in patterns)
        found = next(((match, hf) for match, hf in matches if match), None)
        if found is None:
            raise CheckpointError(
                f"{origin} holds '{name}', which ke_ray's table of {table.tool}'s names lacks: the "
                "model has a part that transformers' class for it does not have. Convert it with "
                f"{table.tool}'s own export to Hugging Face, if there is one."
            )
        match, hf = found
        result[name] = hf.format(i=match.group(1)) if match.groups() else hf
    return result, table.interleaved


def _without_attribute(names: list[str]) -> dict[str, str]:
    """Names without the attribute that held the model, where all of them start with one."""
    first = {name.partition(".")[0] for name in names}
    rest = {name: name.partition(".")[2] for name in names}
    inner = {name.partition(".")[0] for name in rest.values()}
    is_attribute = len(first) == 1 and (not first <= set(_BODIES) or inner & set(_BODIES))
    return rest if is_attribute and all(rest.values()) else {name: name for name in names}
