"""Which parameters are decayed, and clipping."""

from __future__ import annotations

import torch
from tiny_training import tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ke_ray.studies.training import OptimizerSettings
from ke_ray.training.optimizer import build_optimizer, clip_gradients, decayed_names


def test_only_matrices_outside_embeddings_and_norms_are_decayed() -> None:
    decay, no_decay = decayed_names(tiny_model())
    assert no_decay == ["model.embed_tokens.weight"]
    assert all("proj" in name for name in decay)
    assert len(decay) == 2 * 7

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    decay, no_decay = decayed_names(llama)
    assert "lm_head.weight" in decay  # untied, as in OLMo
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(no_decay)

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    decay, no_decay = decayed_names(gpt2)
    assert {"transformer.wpe.weight", "transformer.h.0.ln_1.weight"} <= set(no_decay)
    assert all(name.endswith("weight") for name in decay)
    assert any(name.endswith("c_fc.bias") for name in no_decay)


def test_groups_hold_every_parameter_once() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.3))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_clipping_scales_to_the_limit_and_returns_the_norm_before() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(clip_gradients(layer, None)) == 5.0
    assert float(layer.weight.grad.norm()) == 5.0
    assert float(clip_gradients(layer, 1.0)) == 5.0
    torch.testing.assert_close(layer.weight.grad.norm(), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert float(clip_gradients(layer, 10.0)) < 1.001  # already within the limit
