"""A tiny random decoder of every supported architecture, and three checkpoints on a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_site import Site

from ke_ray.models.saving import save_model

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}

TINY: dict[str, dict[str, Any]] = {
    "olmo": BASE,
    "olmo2": GROUPED,
    "olmo3": {
        **GROUPED,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": {**GROUPED, "mlp_bias": True, "attention_bias": True},
    "mistral": {**GROUPED, "sliding_window": 5},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma": GEMMA,
    "gemma2": {
        **GEMMA,
        "sliding_window": 5,
        "query_pre_attn_scalar": 11,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **GEMMA,
        "sliding_window": 5,
        "query_pre_attn_scalar": 11,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "nanochat": GROUPED,
    "phi": {**GROUPED, "qk_layernorm": True},
    "phi3": {**GROUPED, "original_max_position_embeddings": 64},
    "gpt_neox": {**BASE, "hidden_act": "gelu"},
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "scale_attn_by_inverse_layer_idx": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Any]:
    """``tiny_decoder(model_type, seed=0, **config)``: a model with every parameter random."""

    def build(model_type: str, seed: int = 0, **overrides: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **{**TINY[model_type], **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms start at 0 and 1 otherwise
                parameter.add_(0.15 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def site(
    tmp_path: Path, tiny_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """Three native checkpoints behind an HTTP server."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "site"
    for seed in range(3):
        model = tiny_decoder("olmo", seed=seed, hidden_size=64, intermediate_size=512)
        save_model(model, root / f"step{seed}-unsharded", layout="native")
    server = Site(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
