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

EXPERTS = {**GROUPED, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
DEEPSEEK = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,  # the first layer is dense and wider than the second
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}

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
    "olmoe": {**EXPERTS, "intermediate_size": 12, "num_experts": 4},
    "mixtral": {**EXPERTS, "intermediate_size": 12, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [0]},
    "deepseek_v2": {
        **DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        **EXPERTS,
        "intermediate_size": 12,
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
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
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.add_(0.15 * torch.randn_like(buffer))
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
