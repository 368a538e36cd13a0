"""OpenELM's files, read by ke_ray's own class: logits and measures equal the equations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ke_ray.checkpoints.find.catalog import find_checkpoints
from ke_ray.errors import CheckpointError
from ke_ray.models.configuration import read_outline
from ke_ray.models.loading import load_config, load_model
from ke_ray.models.scoring import score_model

ROWS, D, D_HEAD = 29, 12, 4
QUERY_HEADS, KEY_HEADS, MEMORIES = (2, 6, 4), (1, 2, 4), (8, 24, 16)
IDS = [3, 17, 5, 28, 3, 9, 11]
# The keys of Apple's published configurations; 0.43 · 12 and 1.2 · 12 are rounded up to 8 and 16.
CONFIG: dict[str, Any] = {
    "activation_fn_name": "swish",
    "architectures": ["OpenELMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim_divisor": 8,
    "ffn_multipliers": [0.43, 2.0, 1.2],
    "ffn_with_glu": True,
    "head_dim": D_HEAD,
    "initializer_range": 0.02,
    "max_context_length": 32,
    "model_dim": D,
    "model_type": "openelm",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "num_gqa_groups": 2,
    "num_kv_heads": list(KEY_HEADS),
    "num_query_heads": list(QUERY_HEADS),
    "num_transformer_layers": 3,
    "qkv_multipliers": [0.5, 1.0],
    "rope_freq_constant": 10000,
    "rope_max_length": 64,
    "share_input_output_layers": True,
    "torch_dtype": "float32",
    "transformers_version": "4.39.3",
    "use_cache": True,
    "vocab_size": ROWS,
}


def stored_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"token_embeddings.weight": 0.5 * random(ROWS, D), "norm.weight": 1 + 0.2 * random(D)}
    for layer, (queries, keys, m) in enumerate(zip(QUERY_HEADS, KEY_HEADS, MEMORIES, strict=True)):
        tensors |= {
            f"layers.{layer}.attn.qkv_proj.weight": 0.5 * random((queries + 2 * keys) * D_HEAD, D),
            f"layers.{layer}.attn.q_norm.weight": 1 + 0.2 * random(D_HEAD),
            f"layers.{layer}.attn.k_norm.weight": 1 + 0.2 * random(D_HEAD),
            f"layers.{layer}.attn.out_proj.weight": 0.5 * random(D, queries * D_HEAD),
            f"layers.{layer}.attn_norm.weight": 1 + 0.2 * random(D),
            f"layers.{layer}.ffn_norm.weight": 1 + 0.2 * random(D),
            f"layers.{layer}.ffn.proj_1.weight": 0.5 * random(2 * m, D),
            f"layers.{layer}.ffn.proj_2.weight": 0.5 * random(D, m),
        }
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(stored_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "modeling_openelm.py").write_text("raise SystemExit('remote code was run')")
    return folder


def entropy(p: torch.Tensor) -> float:
    return -sum(value * math.log(value) for value in p.flatten().tolist() if value > 0)


def by_hand(ids: list[int]) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Logits [pos, ROWS] and the measures of every layer, from the equations, in float64."""
    weights = {k.removeprefix("transformer."): v.double() for k, v in stored_tensors().items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    def rotated(head: torch.Tensor) -> torch.Tensor:
        turned = head.clone()
        for position in range(len(head)):
            for j in range(D_HEAD // 2):
                angle = position * 10_000 ** (-2 * j / D_HEAD)
                a, b = head[position, j], head[position, j + D_HEAD // 2]
                turned[position, j] = a * math.cos(angle) - b * math.sin(angle)
                turned[position, j + D_HEAD // 2] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    measures: dict[str, list[float]] = {name: [] for name in ("knowledge", "relu", "attention")}
    x = weights["token_embeddings.weight"][ids]
    for layer, (queries, keys) in enumerate(zip(QUERY_HEADS, KEY_HEADS, strict=True)):
        block = f"layers.{layer}"
        qkv = norm(x, f"{block}.attn_norm") @ weights[f"{block}.attn.qkv_proj.weight"].T
        heads = qkv.split(D_HEAD, dim=-1)
        outputs, rows = [], 0.0
        for head in range(queries):
            shared = queries + head // (queries // keys)
            q = rotated(norm(heads[head], f"{block}.attn.q_norm"))
            k = rotated(norm(heads[shared], f"{block}.attn.k_norm"))
            scores = q @ k.T / math.sqrt(D_HEAD)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
            rows += entropy(scores.softmax(-1)) / queries / len(ids)
            outputs.append(scores.softmax(-1) @ heads[shared + keys])
        measures["attention"].append(rows)
        x = x + torch.cat(outputs, dim=-1) @ weights[f"{block}.attn.out_proj.weight"].T
        both = norm(x, f"{block}.ffn_norm") @ weights[f"{block}.ffn.proj_1.weight"].T
        gate, up = both[:, : MEMORIES[layer]], both[:, MEMORIES[layer] :]
        coefficients = gate / (1 + torch.exp(-gate)) * up
        for name, values in (("knowledge", coefficients), ("relu", gate.clamp(min=0) * up)):
            mean = values.abs().mean(0)
            measures[name].append(entropy(mean / mean.sum()))
        x = x + coefficients @ weights[f"{block}.ffn.proj_2.weight"].T
    logits = norm(x, "norm") @ weights["token_embeddings.weight"].T
    measures["next"] = [sum(map(entropy, logits.softmax(-1))) / len(ids)]
    return logits, measures


def test_the_files_compute_what_the_equations_say(tmp_path) -> None:
    model = load_model(write(tmp_path / "openelm"))
    expected, measures = by_hand(IDS)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].double()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    names = {
        "knowledge": "knowledge_entropy",
        "relu": "knowledge_entropy_relu",
        "attention": "attention_entropy",
    }
    measured = (*names.values(), "next_token_entropy")
    scores = score_model(model, torch.tensor([IDS]), measures=measured)
    for own, name in names.items():
        for layer, value in enumerate(measures[own]):
            row = scores.row(name, layer)
            assert row.value == pytest.approx(value, abs=1e-5), (name, layer)
            assert row.d_mlp == MEMORIES[layer]
    assert scores.row("next_token_entropy").value == pytest.approx(measures["next"][0], abs=1e-5)


def test_it_is_listed_outlined_and_saved_under_apples_names(tmp_path) -> None:
    folder = write(tmp_path / "openelm")
    (ref,) = find_checkpoints(str(folder)).checkpoints
    outline = read_outline(ref)
    assert (outline.vocab_size, outline.max_position_embeddings) == (ROWS, 32)
    load_model(folder).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG if key in config}["num_kv_heads"] == [1, 2, 4]
    again = load_model(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored_tensors().items())


def test_memories_are_apples_multiples() -> None:
    """Of the published OpenELM-1.1B: the first, a middle and the last layer; and a rounding up."""
    from ke_ray.models.openelm import OpenELMConfig

    multipliers = [0.5, 0.63, 2.19, 4.0, 600 / 2048]
    heads = [16] * 5
    config = OpenELMConfig(
        model_dim=2048,
        num_transformer_layers=5,
        num_query_heads=heads,
        num_kv_heads=heads,
        ffn_multipliers=multipliers,
    )
    assert config.intermediate_size == [1024, 1280, 4608, 8192, 768]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_query_heads": [2, 6]}, r"num_query_heads=\[2, 6\] is not a list of 3 positive"),
        ({"num_kv_heads": [1, 0, 4]}, r"num_kv_heads=.* is not a list of 3 positive"),
        ({"ffn_multipliers": None}, r"ffn_multipliers=None is not a list of 3 positive"),
        ({"num_kv_heads": [1, 4, 4]}, "layer 1 has 6 query heads, not a multiple of its 4"),
        ({"ffn_with_glu": False}, "ffn_with_glu=False; ke_ray reads .* as Apple published"),
        ({"share_input_output_layers": False}, "share_input_output_layers=False"),
        ({"model_dim": 24}, "wrong shape"),
        ({"ffn_multipliers": [0.43, 2.0, 1e9]}, "do not belong together"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantis"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_message(tmp_path, change, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write(tmp_path / "openelm", **change))


def test_a_configuration_is_known_without_weights(tmp_path) -> None:
    config = load_config(write(tmp_path / "openelm"))
    assert config.intermediate_size == list(MEMORIES)
