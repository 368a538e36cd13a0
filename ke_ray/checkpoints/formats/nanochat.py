"""nanochat's ``meta_<step>.json``, to the configuration of transformers' NanoChat.

Only the variant that transformers' class computes is read: a key that changes what the model
computes and has no counterpart there is refused by name. nanochat's RMSNorm takes torch's default
ε, which depends on the dtype; transformers' class takes 1e-6, as its published conversions do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.errors import CheckpointError
from ke_ray.storage import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LIMIT = 16 * 2**20  # bytes of a meta file
_KEYS = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
}


def read_nanochat_config(path: Path) -> PreTrainedConfig:
    """The NanoChatConfig of a meta file.

    Raises:
        CheckpointError: missing, malformed, or of a variant that transformers lacks.
    """
    from transformers import NanoChatConfig

    if not path.is_file() or path.stat().st_size > _LIMIT:
        raise CheckpointError(f"There is no '{path}' of at most {_LIMIT:,} bytes.")
    try:
        values = parse_json(path.read_bytes())["model_config"]
        sizes: dict[str, Any] = {hf: values[own] for own, hf in _KEYS.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is not a meta file of nanochat ({error}); expected model_config with "
            f"{', '.join(_KEYS)}."
        ) from error
    others = sorted(set(values) - set(_KEYS))
    # "L" is full attention in every layer.
    if "window_pattern" in others and set(str(values["window_pattern"]).upper()) == {"L"}:
        others.remove("window_pattern")
    if others:
        raise CheckpointError(
            f"'{path}': transformers' NanoChat has no counterpart of {others[0]}="
            f"{values[others[0]]!r}; this variant of nanochat is not supported."
        )
    for own, hf in _KEYS.items():
        if type(sizes[hf]) is not int or not 0 < sizes[hf] < 2**31:
            raise CheckpointError(f"'{path}': {own}={sizes[hf]!r} is not a positive whole number.")
    return NanoChatConfig(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["NanoChatForCausalLM"],
    )
