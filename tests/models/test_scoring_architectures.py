"""Every architecture against loops written from the equations, in float64.

The reference shares nothing with the package: it recomputes the FFN's inside from the input of
the whole FFN block and the raw weights, takes attention rows from eager attention, and the
prediction from the model's own logits, one unpadded instance at a time.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_decoders import BASE, GROUPED, TINY, random_decoder

from ke_ray.core.architecture import Architecture
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models import architectures
from ke_ray.models.scoring import score_model

MEASURES = (
    "knowledge_entropy",
    "knowledge_entropy_relu",
    "attention_entropy",
    "token_entropy",
    "memory_information",
    "next_token_entropy",
    "loss",
    "perplexity",
)

WITHOUT_LAYERS = ("next_token_entropy", "loss", "perplexity")


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, torch.zeros(()))


def xielu(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    """arXiv 2411.13010, Eq. 12, with α_p = softplus(p) and α_n = β + softplus(n), β = 0.5."""
    alpha_p = math.log1p(math.exp(ffn.act_fn.alpha_p.item()))
    alpha_n = 0.5 + math.log1p(math.exp(ffn.act_fn.alpha_n.item()))
    negative = alpha_n * (torch.exp(x.clamp(max=0)) - 1 - x) + 0.5 * x
    return torch.where(x > 0, alpha_p * x * x + 0.5 * x, negative)


def thinned(x: torch.Tensor, share: float) -> torch.Tensor:
    """Gemma-3n's Gaussian top-k: what exceeds the quantile of a normal fitted to the values."""
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64)))
    std = (x - x.mean()).square().mean().sqrt()
    return relu(x - (x.mean() + std * quantile)) if share > 0 else x


# The first projection of ungated FFNs; the others have a gate.
UNGATED = {
    "gpt2": "c_fc",
    "phi": "fc1",
    "gpt_neox": "dense_h_to_4h",
    "apertus": "up_proj",
    "arcee": "up_proj",
    "nemotron": "up_proj",
    "starcoder2": "c_fc",
    "gpt_neo": "c_fc",
    "gptj": "fc_in",
    "falcon": "dense_h_to_4h",
    "opt": "fc1",
    "bloom": "dense_h_to_4h",
    "mpt": "up_proj",
    "persimmon": "dense_h_to_4h",
    "nemotron_h": "up_proj",
    "nanochat": "fc1",
}
ACTIVATIONS = {
    **dict.fromkeys(("gpt_neox", "falcon", "mpt"), gelu),
    **dict.fromkeys(
        ("arcee", "nemotron", "nemotron_h", "persimmon", "nanochat"), lambda x: relu(x) ** 2
    ),
    "opt": relu,
}


def inside(model_type: str, ffn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, ReLU variant) for one token x [d_model], from raw weights."""
    if model_type in UNGATED:
        projection = getattr(ffn, UNGATED[model_type])
        weight = projection.weight.T if model_type == "gpt2" else projection.weight
        pre = weight @ x
        if projection.bias is not None:
            pre = pre + projection.bias
        if model_type == "apertus":
            return xielu(ffn, pre), relu(pre)
        return ACTIVATIONS.get(model_type, gelu_tanh)(pre), relu(pre)
    if model_type == "phi3":
        gate, up = (ffn.gate_up_proj.weight @ x).split(48)
    elif model_type == "openelm":
        gate, up = (ffn.proj_1.weight @ x).chunk(2)
    elif model_type == "lfm2":
        gate, up = ffn.w1.weight @ x, ffn.w3.weight @ x
    else:
        gate, up = ffn.gate_proj.weight @ x, ffn.up_proj.weight @ x
        if ffn.gate_proj.bias is not None:
            gate, up = gate + ffn.gate_proj.bias, up + ffn.up_proj.bias
    if model_type == "gemma3n_text":
        gate = thinned(gate, ffn.activation_sparsity)
    elif model_type == "falcon_h1":
        gate = gate * 0.8  # mlp_multipliers[0]
    act = gelu_tanh if model_type.startswith("gemma") else silu
    return act(gate) * up, relu(gate) * up


def blocks_of(model_type: str, model: Any) -> list[Any]:
    """Every layer's FFN; None where it has none."""
    body = model.base_model
    if model_type == "nemotron_h":
        kinds = model.config.layers_block_type
        layers = zip(kinds, body.layers, strict=True)
        return [layer.mixer if kind == "mlp" else None for kind, layer in layers]
    if model_type == "opt":
        return list(body.decoder.layers)
    layers = next(getattr(body, name) for name in ("layers", "h", "blocks") if hasattr(body, name))
    names = ("mlp", "feed_forward", "ffn")
    return [getattr(layer, next(n for n in names if hasattr(layer, n))) for layer in layers]


def with_attention(model: Any, n_layers: int) -> list[int]:
    """The layers whose attention entropy has a meaning."""
    model_type = model.config.model_type
    if model_type in ("bloom", "mpt") or getattr(model.config, "alibi", False):
        return []
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * n_layers
    attending = ("full_attention", "sliding_attention", "hybrid")
    return [i for i, kind in enumerate(kinds) if kind in attending]


def entropy(p: torch.Tensor) -> float:
    return -sum(float(v) * math.log(float(v)) for v in p.flatten() if float(v) > 0)


def brute_force(model_type: str, model: Any, rows: list[list[int]]) -> dict[str, list[Any]]:
    """Values per layer; None where a measure has no meaning."""
    model = copy.deepcopy(model).double()
    if model_type == "falcon":
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    blocks = blocks_of(model_type, model)
    n_layers = len(blocks)
    with_ffn = [layer for layer, block in enumerate(blocks) if block is not None]
    mean_c: list[Any] = [0.0] * n_layers
    mean_relu: list[Any] = [0.0] * n_layers
    attending = with_attention(model, n_layers)
    attention = [0.0 if layer in attending else None for layer in range(n_layers)]
    of_tokens: list[list[tuple[float, torch.Tensor]]] = [[] for _ in blocks]
    prediction = 0.0
    losses: list[float] = []
    for row in rows:
        seen: list[torch.Tensor] = []
        hooks = [
            (b.fc1 if model_type == "opt" else b).register_forward_pre_hook(
                lambda _m, a, to=seen: to.append(a[0].detach().reshape(-1, a[0].shape[-1]))
            )
            for b in blocks
            if b is not None
        ]
        with torch.no_grad():
            out = model(torch.tensor([row]), output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        share = 1 / (len(rows) * len(row))
        for layer in with_ffn:
            for x in seen[with_ffn.index(layer)]:
                c, variant = inside(model_type, blocks[layer], x)
                mean_c[layer] += c.detach().abs() * share
                mean_relu[layer] += variant.detach().abs() * share
                of_tokens[layer].append((share, c.detach().abs()))
        for layer, given in zip(attending, out.attentions if attending else (), strict=True):
            probabilities = given[0].double()  # [heads, T, T]
            heads = probabilities.shape[0]
            attention[layer] += entropy(probabilities) * share / heads
        for place, logits in enumerate(out.logits[0].double()):
            p = torch.exp(logits - logits.max())
            prediction += entropy(p / p.sum()) * share
            if place + 1 < len(row):
                losses.append(-math.log(float(p[row[place + 1]] / p.sum())))
    return {
        "knowledge_entropy": [of_shares(c) for c in mean_c],
        "knowledge_entropy_relu": [of_shares(c) for c in mean_relu],
        "attention_entropy": attention,
        "token_entropy": [split_by_token(tokens)[0] for tokens in of_tokens],
        "memory_information": [split_by_token(tokens)[1] for tokens in of_tokens],
        "next_token_entropy": [prediction],
        "loss": [sum(losses) / len(losses)],
        "perplexity": [math.exp(sum(losses) / len(losses))],
        "d_mlp": [0 if block is None else len(c) for block, c in zip(blocks, mean_c, strict=True)],
    }


def of_shares(c: Any) -> float | None:
    return entropy(c / c.sum()) if isinstance(c, torch.Tensor) else None


def split_by_token(
    tokens: list[tuple[float, torch.Tensor]],
) -> tuple[float, float] | tuple[None, None]:
    """Σ w H(p) and Σ w KL(p ‖ q), of (weight in Eq. 2, |C|) of every token; q their mixture."""
    if not tokens:
        return None, None
    total = sum(share * float(c.sum()) for share, c in tokens)
    w = [share * float(c.sum()) / total for share, c in tokens]
    p = [c / c.sum() if float(c.sum()) else c for _, c in tokens]
    q = sum(weight * own for weight, own in zip(w, p, strict=True))
    divergence = [
        sum(a * math.log(a / b) for a, b in zip(own.tolist(), q.tolist(), strict=True) if a > 0)
        for own in p
    ]
    return (
        sum(weight * entropy(own) for weight, own in zip(w, p, strict=True)),
        sum(weight * d for weight, d in zip(w, divergence, strict=True)),
    )


FALCON_7B = {"new_decoder_architecture": False, "num_kv_heads": None, "multi_query": True}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in TINY),
    ("falcon", FALCON_7B),
    ("falcon", {**FALCON_7B, "multi_query": False, "parallel_attn": False}),
    ("falcon", {**FALCON_7B, "alibi": True}),
    ("opt", {"do_layer_norm_before": True, "word_embed_proj_dim": 32}),
    ("stablelm", {"qk_layernorm": False, "use_parallel_residual": False}),
]


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_all_measures_equal_the_equations(tiny_decoder, model_type, overrides):
    model = tiny_decoder(model_type, **overrides)
    if overrides.get("alibi"):  # elsewhere transformers rounds Falcon's penalty to bfloat16
        model.config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(1)
    lengths = [12, 7, 1, 9]
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    expected = brute_force(model_type, model, rows)
    d_mlp = expected.pop("d_mlp")
    ids = torch.zeros(4, 12, dtype=torch.int64)
    mask = torch.zeros(4, 12, dtype=torch.int64)
    for n, row in enumerate(rows):  # left padding, so that compaction is part of what is tested
        ids[n, 12 - len(row) :] = torch.tensor(row)
        mask[n, 12 - len(row) :] = 1
    got = score_model(model, ids, mask, measures=MEASURES, batch_size=3)
    for measure, values in expected.items():
        total = got.row(measure)
        if measure in WITHOUT_LAYERS:
            assert total.value == pytest.approx(values[0], abs=1e-5, rel=1e-5)
            continue
        for layer, value in enumerate(values):
            row = got.row(measure, layer)
            assert row.d_mlp == d_mlp[layer]
            if value is None:
                assert math.isnan(row.value), (measure, layer)
                assert row.reason, (measure, layer)
            else:
                assert row.value == pytest.approx(value, abs=1e-5), (measure, layer)
                assert row.reason is None
        present = [value for value in values if value is not None]
        if present:
            assert total.value == pytest.approx(sum(present), abs=1e-5 * len(present))
        else:
            assert math.isnan(total.value)
            assert total.reason
        assert total.d_mlp == (d_mlp[0] if len(set(d_mlp)) == 1 else None)
    assert got.num_tokens == sum(lengths)
    assert got.is_finite()


@pytest.fixture
def described(monkeypatch):
    """A function that gives this process a description, until the test ends."""
    monkeypatch.setattr(architectures, "_DESCRIBED", {})
    return lambda **row: architectures.use_description(Architecture(**row))


def example_of_the_docs() -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    (block,) = re.findall(r"```yaml\n(model_type: .*?)```", text, re.DOTALL)
    return yaml.safe_load(block)


@pytest.mark.parametrize(
    "row", [{"model_type": "seed_oss"}, example_of_the_docs()], ids=["seed_oss", "docs"]
)
def test_a_decoder_that_its_user_describes_equals_the_equations(described, row):
    model_type = row["model_type"]
    sizes = {"seed_oss": {**GROUPED, "head_dim": 8}, "persimmon": {**BASE, "hidden_act": "relu2"}}
    model = random_decoder(model_type, sizes[model_type])
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UnsupportedArchitectureError, match=r"not known.*--architecture FILE"):
        score_model(model, ids)
    described(**row)
    expected = brute_force(model_type, model, ids.tolist())
    got = score_model(model, ids, measures=MEASURES)
    for measure in MEASURES[:3]:
        for layer, value in enumerate(expected[measure]):
            assert got.row(measure, layer).value == pytest.approx(value, abs=1e-5)
    assert got.row("next_token_entropy").value == pytest.approx(
        expected["next_token_entropy"][0], abs=1e-5
    )


def test_a_description_without_the_scale_of_the_logits_is_refused(described, tiny_decoder):
    model = tiny_decoder("granite")
    ids = torch.tensor([[3, 4, 5]])
    described(model_type="granite")
    with pytest.raises(UnsupportedArchitectureError, match="logit_divisor"):
        score_model(model, ids, measures="next_token_entropy")
    described(model_type="granite", logit_divisor="logits_scaling")
    assert score_model(model, ids, measures="next_token_entropy").is_finite()


def test_a_description_of_modules_that_never_run_is_refused(described, tiny_decoder):
    model = tiny_decoder("gptj")
    described(
        model_type="gptj", layers="h", second_projection="fc_out", up="fc_in", gate=None,
        attention="attn",
    )  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError, match="returns_attention"):
        score_model(model, torch.tensor([[3, 4, 5]]), measures="attention_entropy")


def test_a_bloom_that_goes_around_its_second_projection_is_refused(tiny_decoder):
    model = tiny_decoder("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(UnsupportedArchitectureError, match="slow_but_exact"):
        score_model(model, torch.tensor([[3, 4, 5]]), measures="knowledge_entropy")
