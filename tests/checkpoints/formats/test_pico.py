"""Pico's checkpoints (``pico_decoder``): read as Llama, without running their code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ke_ray.checkpoints.find.catalog import find_checkpoints
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.errors import CheckpointError
from ke_ray.models.configuration import read_outline
from ke_ray.models.loading import load_config, load_model
from ke_ray.models.scoring import score_model

D, HEADS, KV_HEADS, LAYERS, MEMORIES, ROWS = 16, 4, 2, 2, 40, 64
D_HEAD = D // HEADS
CONFIG: dict[str, Any] = {
    "activation_hidden_dim": MEMORIES,
    "architectures": ["PicoDecoderHF"],
    "attention_n_heads": HEADS,
    "attention_n_kv_heads": KV_HEADS,
    "auto_map": {"AutoModelForCausalLM": "pico_decoder.PicoDecoderHF"},
    "batch_size": 1024,
    "d_model": D,
    "max_seq_len": 32,
    "model_type": "pico_decoder",
    "n_layers": LAYERS,
    "norm_eps": 1e-6,
    "position_emb_theta": 10000.0,
    "vocab_size": ROWS,
}
PREFIX = "pico_decoder."
IDS = [3, 9, 40, 12, 7, 33, 2]


def stored_tensors() -> dict[str, torch.Tensor]:
    """Random tensors under Pico's own names, with its prefix."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding_proj.weight": (ROWS, D),
        "output_norm.weight": (D,),
        "de_embedding_proj.weight": (ROWS, D),
    }
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{name}.attention.{part}_proj.weight"] = (heads * D_HEAD, D)
        shapes[f"{name}.attention.o_proj.weight"] = (D, D)
        shapes[f"{name}.swiglu.w_0.weight"] = shapes[f"{name}.swiglu.w_1.weight"] = (MEMORIES, D)
        shapes[f"{name}.swiglu.w_2.weight"] = (D, MEMORIES)
        shapes[f"{name}.attention_norm.weight"] = shapes[f"{name}.swiglu_norm.weight"] = (D,)
    return {
        PREFIX + name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()
    }


def forward(ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [T, rows] and each layer's coefficients [T, memories], from Pico's equations."""
    weights = {name.removeprefix(PREFIX): t.double() for name, t in stored_tensors().items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + CONFIG["norm_eps"]).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [T, d_head]; neighbours are a complex number
        rates = CONFIG["position_emb_theta"] ** (-torch.arange(0, D_HEAD, 2).double() / D_HEAD)
        angle = torch.arange(len(x)).double()[:, None] * rates
        turned = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(1)

    x, coefficients = weights["embedding_proj.weight"][ids], []
    for layer in range(LAYERS):
        block = f"layers.{layer}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (y @ weights[f"{block}.attention.{part}_proj.weight"].T for part in "qkv")
        outputs = []
        for head in range(HEADS):
            own = slice(head * D_HEAD, (head + 1) * D_HEAD)
            shared = head // (HEADS // KV_HEADS)
            theirs = slice(shared * D_HEAD, (shared + 1) * D_HEAD)
            scores = rotated(q[:, own]) @ rotated(k[:, theirs]).T / math.sqrt(D_HEAD)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
            outputs.append(scores.softmax(-1) @ v[:, theirs])
        x = x + torch.cat(outputs, dim=-1) @ weights[f"{block}.attention.o_proj.weight"].T
        y = norm(x, f"{block}.swiglu_norm")
        gate, up = (y @ weights[f"{block}.swiglu.w_{i}.weight"].T for i in (0, 1))
        coefficients.append(gate * gate.sigmoid() * up)
        x = x + coefficients[-1] @ weights[f"{block}.swiglu.w_2.weight"].T
    return norm(x, "output_norm") @ weights["de_embedding_proj.weight"].T, coefficients


def write(folder: Path, config: dict[str, Any], *, prefix: str = PREFIX) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {prefix + name.removeprefix(PREFIX): t for name, t in stored_tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pico_decoder.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_the_model_computes_what_picos_equations_say(tmp_path, prefix):
    model = load_model(write(tmp_path / "step5", CONFIG, prefix=prefix), dtype=torch.float64)
    assert model.config.model_type == "llama"
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    expected, coefficients = forward(IDS)
    # Norms of transformers run in float32.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    scores = score_model(model, torch.tensor([IDS]))
    for layer, values in enumerate(coefficients):
        shares = values.abs().mean(0) / values.abs().mean(0).sum()
        entropy = -(shares * shares.log()).sum().item()
        assert scores.row("knowledge_entropy", layer=layer).value == pytest.approx(
            entropy, abs=1e-5
        )


def test_listings_outlines_and_hashes_know_it(tmp_path):
    folder = write(tmp_path / "step5", CONFIG)
    (ref,) = find_checkpoints(str(folder)).checkpoints
    assert ref.series == f"pico_decoder, {LAYERS} layers, d_model {D}, d_mlp {MEMORIES}"
    outline = read_outline(ref)
    assert (outline.vocab_size, outline.max_position_embeddings) == (ROWS, 32)
    assert load_config(folder).num_key_value_heads == KV_HEADS
    load_model(folder).save_pretrained(tmp_path / "hf")
    assert weights_sha256(folder) == weights_sha256(tmp_path / "hf")


def test_without_a_number_of_key_value_heads_each_query_head_has_its_own(tmp_path):
    folder = write(tmp_path / "step5", CONFIG | {"attention_n_kv_heads": None})
    assert load_config(folder).num_key_value_heads == HEADS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "16"}, "d_model='16' is not a positive whole number"),
        ({"n_layers": 0}, "n_layers=0 is not"),
        ({"norm_eps": 0}, "norm_eps=0 is not a positive number"),
        ({"attention_n_heads": 3}, "d_model=16 must be an even multiple"),
        ({"attention_n_kv_heads": 3}, "multiple of attention_n_kv_heads=3"),
        ({"d_model": 32}, "wrong shape"),
        ({"n_layers": 3}, "missing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_message(tmp_path, change, message):
    folder = write(tmp_path / "step5", CONFIG | change)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_tensor_that_is_not_picos_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "step5", CONFIG)
    tensors = stored_tensors() | {f"{PREFIX}layers.0.swiglu.w_3.weight": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"swiglu\.w_3.*Pico"):
        load_model(folder)
