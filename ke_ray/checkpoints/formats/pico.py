"""Pico's ``config.json`` (model type ``pico_decoder``), to transformers' Llama.

The class of these repositories comes as code, which ke_ray never runs, and transformers has none.
What it computes is a Llama: RMS norms before attention and feed-forward, grouped-query attention,
SwiGLU, no biases, an output head of its own. Its rotary embedding turns neighbouring elements of a
head (2j, 2j + 1), where transformers' Llama turns (j, j + d_head/2): rows of queries and keys are
put in that order when the weights are read (``tool_names``, ``weights``). Facts from
``src/model/pico_decoder.py`` of github.com/pico-lm/pico-train.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.errors import CheckpointError
from ke_ray.storage import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MODEL_TYPE = "pico_decoder"
_LIMIT = 16 * 2**20  # bytes of a config file
_INT_LIMIT = 2**31
_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "attention_n_heads": "num_attention_heads",
    "attention_n_kv_heads": "num_key_value_heads",
    "activation_hidden_dim": "intermediate_size",
}


def is_pico(path: Path) -> bool:
    """Whether a ``config.json`` is Pico's."""
    return _values(path) is not None


def read_pico_config(path: Path) -> PreTrainedConfig | None:
    """The LlamaConfig of a ``config.json`` of Pico; None where it is another file.

    Raises:
        CheckpointError: malformed.
    """
    from transformers import LlamaConfig

    values = _values(path)
    if values is None:
        return None
    # An absent number of key-value heads means one for each query head.
    if values.get("attention_n_kv_heads") is None:
        values["attention_n_kv_heads"] = values.get("attention_n_heads")
    sizes: dict[str, int] = {}
    for own in _SIZES:
        size = values.get(own)
        if type(size) is not int or not 0 < size < _INT_LIMIT:
            raise CheckpointError(f"'{path}': {own}={size!r} is not a positive whole number.")
        sizes[own] = size
    rates: dict[str, float] = {}
    for own, default in (("norm_eps", 1e-6), ("position_emb_theta", 10_000.0)):
        rate = values.get(own, default)
        if type(rate) not in (int, float) or not 0 < rate < _INT_LIMIT:
            raise CheckpointError(f"'{path}': {own}={rate!r} is not a positive number.")
        rates[own] = float(rate)
    width, heads, kv_heads = (
        sizes[own] for own in ("d_model", "attention_n_heads", "attention_n_kv_heads")
    )
    if width % (2 * heads) or heads % kv_heads:
        raise CheckpointError(
            f"'{path}': d_model={width} must be an even multiple of attention_n_heads={heads}, and "
            f"attention_n_heads a multiple of attention_n_kv_heads={kv_heads}."
        )
    return LlamaConfig(
        **{hf: sizes[own] for own, hf in _SIZES.items()},
        rms_norm_eps=rates["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": rates["position_emb_theta"]},
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["LlamaForCausalLM"],
    )


def _values(path: Path) -> dict[str, Any] | None:
    if not path.is_file() or path.stat().st_size > _LIMIT:
        return None
    try:
        values = parse_json(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    is_own = isinstance(values, dict) and values.get("model_type") == _MODEL_TYPE
    return values if is_own else None
