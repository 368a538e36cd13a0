"""Tiny random models and spans that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

VOCAB = 97


def build(model_type: str, *, attention: str | None = None, **changes: Any) -> Any:
    """A random two-layer model with 97 embeddings and 64 positions, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attention_dropout": 0.1,
        "initializer_range": 0.2,
    } | changes
    known = {key: value for key, value in sizes.items() if hasattr(config, key)}
    config = AutoConfig.for_model(model_type, **known)
    attention = attention or ("eager" if model_type in ("gemma2", "bloom") else "sdpa")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(model_type, attention=…, **config)`` with a vocabulary of 97."""
    return build
