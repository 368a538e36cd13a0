"""A decoder with fresh weights, from the ``model`` keys of a pretraining study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ke_ray.errors import ConfigError, UnsupportedArchitectureError, nearest
from ke_ray.studies.training import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_config(
    architecture: Architecture, *, vocab_size: int, sequence_length: int, eos_token_id: int
) -> PreTrainedConfig:
    """The transformers configuration of ``architecture``.

    Raises:
        ConfigError: no such model_type, or ``extra`` holds keys that its config does not know.
        UnsupportedArchitectureError: ke_ray could not scan what this would train.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from ke_ray.models.architectures import check_config

    kind = architecture.model_type
    if kind not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"model.model_type '{kind}' is unknown to transformers."
            f"{nearest(kind, CONFIG_MAPPING_NAMES)}"
        )
    known = AutoConfig.for_model(kind)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": architecture.d_model,
        "num_hidden_layers": architecture.n_layers,
        "num_attention_heads": architecture.n_heads,
        "max_position_embeddings": architecture.max_positions or sequence_length,
        "n_inner" if hasattr(known, "n_inner") else "intermediate_size": architecture.d_mlp,
        "tie_word_embeddings": architecture.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    for key, value in (
        ("num_key_value_heads", architecture.n_heads),
        ("head_dim", architecture.d_model // architecture.n_heads),
    ):
        if getattr(known, key, None) is not None or key == "num_key_value_heads":
            values[key] = value
    odd = [key for key in architecture.extra if not hasattr(known, key)]
    if odd:
        raise ConfigError(
            f"model.extra holds '{odd[0]}', which the config of '{kind}' does not know."
            f"{nearest(odd[0], vars(known))}"
        )
    try:
        config = AutoConfig.for_model(kind, **{**values, **architecture.extra})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: transformers refuses this '{kind}': {error}.") from error
    check_config(config)
    return config


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Fresh float32 weights, the same for one seed; the global generator is left as it was.

    Raises:
        UnsupportedArchitectureError: transformers has no causal language model of this kind.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            raise UnsupportedArchitectureError(
                f"transformers has no causal language model of type '{config.model_type}'."
            ) from error
