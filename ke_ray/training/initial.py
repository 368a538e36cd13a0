"""A decoder with fresh weights, from the ``model`` keys of a pretraining study."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ke_ray.errors import ConfigError, UnsupportedArchitectureError, nearest
from ke_ray.models.architectures import check_config
from ke_ray.studies.training import ModelShape


def build_config(
    shape: ModelShape, *, vocab_size: int, sequence_length: int, eos_token_id: int
) -> PreTrainedConfig:
    """Make the transformers configuration of ``shape``.

    Raises:
        ConfigError: no such model_type, or ``extra`` holds keys that its config does not have.
        UnsupportedArchitectureError: ke_ray could not scan what this would train.
    """
    kind = shape.model_type
    if kind not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"model.model_type '{kind}' is unknown to transformers."
            f"{nearest(kind, CONFIG_MAPPING_NAMES)}"
        )
    defaults = AutoConfig.for_model(kind)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "max_position_embeddings": shape.max_positions or sequence_length,
        "n_inner" if hasattr(defaults, "n_inner") else "intermediate_size": shape.d_mlp,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    for key, value in (
        ("num_key_value_heads", shape.n_heads),
        ("head_dim", shape.d_model // shape.n_heads),
    ):
        if getattr(defaults, key, None) is not None or key == "num_key_value_heads":
            values[key] = value
    unknown = [key for key in shape.extra if not hasattr(defaults, key)]
    if unknown:
        raise ConfigError(
            f"model.extra has '{unknown[0]}', which the config of '{kind}' does not know."
            f"{nearest(unknown[0], vars(defaults))}"
        )
    try:
        config = AutoConfig.for_model(kind, **{**values, **shape.extra})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: transformers rejects this '{kind}': {error}.") from error
    check_config(config)
    return config


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Make fresh float32 weights from a seed; the global generator keeps its state.

    Raises:
        UnsupportedArchitectureError: transformers has no causal language model of this kind.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise UnsupportedArchitectureError(
                f"transformers has no causal language model of type '{config.model_type}'."
            ) from error
