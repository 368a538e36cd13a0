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
LINEAR = {
    **GROUPED,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

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
    "apertus": GROUPED,
    "arcee": {**GROUPED, "hidden_act": "relu2", "mlp_bias": True},
    "nemotron": {**GROUPED, "mlp_bias": True},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "exaone4": {
        **GROUPED,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "helium": {**GROUPED, "head_dim": 8, "mlp_bias": True},
    "stablelm": {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True},
    "granite": {
        **GROUPED,
        "logits_scaling": 1.7,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "cohere": {**GROUPED, "logit_scale": 0.6, "use_qk_norm": True},
    "cohere2": {
        **GROUPED,
        "logit_scale": 0.6,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "starcoder2": {**GROUPED, "sliding_window": 5},
    "gpt_neo": {
        **{key: value for key, value in BASE.items() if not key.startswith("num_")},
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
    },
    "gptj": {
        "vocab_size": 97,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon": {
        **BASE,
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
    },
    "opt": {
        **BASE,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "bloom": {**BASE, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "qwen3_next": {**LINEAR, "num_experts": 0},
    "qwen3_5_text": LINEAR,
    "olmo_hybrid": LINEAR,
    "nemotron_h": {
        **{key: value for key, value in GROUPED.items() if key != "num_hidden_layers"},
        "layers_block_type": ["mlp", "linear_attention", "full_attention", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "lfm2": {
        **GROUPED,
        "num_hidden_layers": 3,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "falcon_h1": {
        **GROUPED,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.7,
        "mlp_multipliers": [0.8, 1.3],
        "key_multiplier": 0.9,
        "attention_in_multiplier": 1.1,
        "attention_out_multiplier": 0.9,
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.0],
    },
    "openelm": {
        **{key: BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        "model_dim": 32,
        "num_transformer_layers": 3,
        "max_context_length": 64,
        "head_dim": 8,
        "num_query_heads": [2, 4, 6],
        "num_kv_heads": [1, 2, 2],
        "ffn_multipliers": [1.45, 0.5, 2.0],
        "ffn_dim_divisor": 8,
    },
    "gemma3n_text": {
        **GEMMA,
        "intermediate_size": [48, 64, 48],
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.8, 0.0, 0.0],
        "final_logit_softcapping": 3.0,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
}

TINY_MIXTURES: dict[str, dict[str, Any]] = {
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


def random_decoder(model_type: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A model with every parameter random, of any type that transformers has, or OpenELM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import ke_ray.models.openelm  # noqa: F401 - registers its classes

    torch.manual_seed(seed)
    built = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1 otherwise
            parameter.add_(0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek-V3's, which balances the load
                buffer.add_(0.15 * torch.randn_like(buffer))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Any]:
    """``tiny_decoder(model_type, seed=0, **config)``: a model with every parameter random."""

    def build(model_type: str, seed: int = 0, **overrides: Any) -> Any:
        config = {**(TINY | TINY_MIXTURES)[model_type], **overrides}
        return random_decoder(model_type, config, seed)

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
