"""Every architecture against loops written from the equations, in float64.

The reference shares nothing with the package: it recomputes the FFN's inside from the input of
the whole FFN block and the raw weights, takes attention rows from eager attention, and the
prediction from the model's own logits, one unpadded instance at a time.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from ke_ray.models.scoring import score_model

MEASURES = (
    "knowledge_entropy",
    "knowledge_entropy_relu",
    "attention_entropy",
    "next_token_entropy",
)
ALL = [
    *("olmo", "olmo2", "olmo3", "llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2"),
    "nanochat",
]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def inside(model_type: str, ffn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, ReLU variant) for one token x [d_model], from raw weights."""
    relu = torch.zeros(())
    if model_type == "gpt2":
        pre = ffn.c_fc.weight.T @ x + ffn.c_fc.bias
        return gelu_tanh(pre), torch.maximum(pre, relu)
    if model_type == "phi":
        pre = ffn.fc1.weight @ x + ffn.fc1.bias
        return gelu_tanh(pre), torch.maximum(pre, relu)
    if model_type == "nanochat":
        pre = torch.maximum(ffn.fc1.weight @ x, relu)
        return pre * pre, pre
    if model_type == "gpt_neox":
        pre = ffn.dense_h_to_4h.weight @ x + ffn.dense_h_to_4h.bias
        return gelu(pre), torch.maximum(pre, relu)
    if model_type == "phi3":
        gate, up = (ffn.gate_up_proj.weight @ x).split(48)
    else:
        gate, up = ffn.gate_proj.weight @ x, ffn.up_proj.weight @ x
        if ffn.gate_proj.bias is not None:
            gate, up = gate + ffn.gate_proj.bias, up + ffn.up_proj.bias
    act = gelu_tanh if model_type.startswith("gemma") else silu
    return act(gate) * up, torch.maximum(gate, relu) * up


def entropy(p: torch.Tensor) -> float:
    return -sum(float(v) * math.log(float(v)) for v in p.flatten() if float(v) > 0)


def brute_force(model_type: str, model: Any, rows: list[list[int]]) -> dict[str, list[float]]:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    blocks = [
        layer.mlp for layer in getattr(model.base_model, "layers", None) or model.base_model.h
    ]
    n_layers = len(blocks)
    mean_c = torch.zeros(n_layers, 48, dtype=torch.float64)
    mean_relu = torch.zeros_like(mean_c)
    attention = [0.0] * n_layers
    prediction = 0.0
    for row in rows:
        inputs: list[torch.Tensor] = []
        hooks = [
            b.register_forward_pre_hook(lambda _m, a, to=inputs: to.append(a[0].detach()[0]))
            for b in blocks
        ]
        with torch.no_grad():
            out = model(torch.tensor([row]), output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        share = 1 / (len(rows) * len(row))
        for layer in range(n_layers):
            for x in inputs[layer]:
                c, relu = inside(model_type, blocks[layer], x)
                mean_c[layer] += c.detach().abs() * share
                mean_relu[layer] += relu.detach().abs() * share
            probabilities = out.attentions[layer][0].double()  # [heads, T, T]
            heads = probabilities.shape[0]
            attention[layer] += entropy(probabilities) * share / heads
        for logits in out.logits[0].double():
            p = torch.exp(logits - logits.max())
            prediction += entropy(p / p.sum()) * share
    return {
        "knowledge_entropy": [entropy(c / c.sum()) for c in mean_c],
        "knowledge_entropy_relu": [entropy(c / c.sum()) for c in mean_relu],
        "attention_entropy": attention,
        "next_token_entropy": [prediction],
    }


@pytest.mark.parametrize("model_type", ALL)
def test_all_measures_equal_the_equations(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    generator = torch.Generator().manual_seed(1)
    lengths = [12, 7, 1, 9]
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    expected = brute_force(model_type, model, rows)
    ids = torch.zeros(4, 12, dtype=torch.int64)
    mask = torch.zeros(4, 12, dtype=torch.int64)
    for n, row in enumerate(rows):  # left padding, so that compaction is part of what is tested
        ids[n, 12 - len(row) :] = torch.tensor(row)
        mask[n, 12 - len(row) :] = 1
    got = score_model(model, ids, mask, measures=MEASURES, batch_size=3)
    for measure, values in expected.items():
        layers = [None] if measure == "next_token_entropy" else range(len(values))
        for layer, value in zip(layers, values, strict=True):
            assert got.row(measure, layer).value == pytest.approx(value, abs=1e-5), measure
    assert got.num_tokens == sum(lengths)
