"""``hf_olmo`` repositories (DataDecide, the first OLMo ones): read without running their code."""

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
from ke_ray.errors import CheckpointError, UnsupportedArchitectureError
from ke_ray.models.configuration import read_outline
from ke_ray.models.loading import load_config, load_model

D, HEADS, LAYERS, RATIO, ROWS = 16, 2, 2, 4, 64
# As the published repositories store it: DataDecide's norms are RMS with weights.
DATADECIDE: dict[str, Any] = {
    "architectures": ["OLMoForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_olmo.OLMoConfig"},
    "model_type": "hf_olmo",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "activation_type": "swiglu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "sequential",
    "clip_qkv": None,
    "d_model": D,
    "embedding_dropout": 0.0,
    "embedding_layer_norm": False,
    "embedding_size": ROWS,
    "eos_token_id": 50,
    "flash_attention": True,
    "include_bias": False,
    "init_cutoff_factor": 3.0,
    "init_device": "cuda",
    "init_fn": "normal",
    "init_std": 0.02,
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "max_sequence_length": 32,
    "mlp_hidden_size": None,
    "mlp_ratio": RATIO,
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": None,
    "n_layers": LAYERS,
    "norm_after": False,
    "pad_token_id": 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 10000,
    "scale_emb_init": False,
    "scale_logits": False,
    "vocab_size": 60,
    "weight_tying": False,
}
OLMO_1B = {
    **DATADECIDE,
    "layer_norm_type": "default",
    "layer_norm_with_affine": False,
    "layer_norm_eps": 1e-5,
    "weight_tying": True,
}


def stored_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random tensors under the names of OLMo's own code."""
    generator = torch.Generator().manual_seed(0)
    hidden = RATIO * D
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (ROWS, D)}
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = (ROWS, D)
    if config["layer_norm_type"] == "rms":
        shapes["ln_f.weight"] = (D,)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        shapes[f"{block}.att_proj.weight"] = (3 * D, D)
        shapes[f"{block}.attn_out.weight"] = (D, D)
        shapes[f"{block}.ff_proj.weight"] = (hidden, D)
        shapes[f"{block}.ff_out.weight"] = (D, hidden // 2)
        if config["layer_norm_type"] == "rms":
            shapes[f"{block}.attn_norm.weight"] = shapes[f"{block}.ff_norm.weight"] = (D,)
    return {
        f"model.transformer.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def forward(config: dict[str, Any], tensors: dict[str, torch.Tensor], ids: list[int]) -> Any:
    """Logits [T, rows] from OLMo's equations and the stored tensors, in float64."""
    weights = {n.removeprefix("model.transformer."): t.double() for n, t in tensors.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        eps = config["layer_norm_eps"]
        if config["layer_norm_type"] == "rms":
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [T, d_head]
        half = x.shape[-1] // 2
        turns = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * turns
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=-1,
        )

    x = weights["wte.weight"][ids]
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        q, k, v = (norm(x, f"{block}.attn_norm") @ weights[f"{block}.att_proj.weight"].T).split(
            D, dim=-1
        )
        outputs = []
        for head in range(HEADS):
            own = slice(head * D // HEADS, (head + 1) * D // HEADS)
            scores = rotated(q[:, own]) @ rotated(k[:, own]).T / math.sqrt(D // HEADS)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
            outputs.append(scores.softmax(-1) @ v[:, own])
        x = x + torch.cat(outputs, dim=-1) @ weights[f"{block}.attn_out.weight"].T
        up, gate = (norm(x, f"{block}.ff_norm") @ weights[f"{block}.ff_proj.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{block}.ff_out.weight"].T
    head = weights["wte.weight" if config["weight_tying"] else "ff_out.weight"]
    return norm(x, "ln_f") @ head.T


def write(folder: Path, config: dict[str, Any], *, pickled: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = stored_tensors(config)
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # What such a repository carries beside it, and what would say so if it were run.
    (folder / "configuration_olmo.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize(
    ("config", "model_type"), [(DATADECIDE, "llama"), (OLMO_1B, "olmo")], ids=["rms", "olmo"]
)
def test_the_model_computes_what_olmos_equations_say(tmp_path, config, model_type, pickled):
    folder = write(tmp_path / "step5", config, pickled=pickled)
    model = load_model(folder, dtype=torch.float64)
    assert model.config.model_type == model_type
    ids = [3, 9, 40, 12, 7, 33, 2]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    expected = forward(config, stored_tensors(config), ids)
    # Norms of transformers run in float32.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_listings_outlines_and_hashes_know_them(tmp_path, tiny_decoder):
    folder = write(tmp_path / "step5", DATADECIDE)
    (ref,) = find_checkpoints(str(folder)).checkpoints
    outline = read_outline(ref)
    assert (outline.vocab_size, outline.max_position_embeddings) == (ROWS, 32)
    assert outline.eos_token_id == 50
    assert load_config(folder).intermediate_size == RATIO * D // 2
    model = load_model(folder)
    model.save_pretrained(tmp_path / "hf")
    assert weights_sha256(folder) == weights_sha256(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, "alibi=True"),
        ({"attention_layer_norm": True}, "attention_layer_norm=True.*Llama"),
        ({"scale_logits": True}, "scale_logits=True"),
        ({"new_switch": True}, "new_switch=True"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "step5", {**DATADECIDE, **change})
    with pytest.raises(UnsupportedArchitectureError, match=message):
        load_model(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder = write(tmp_path / "step5", DATADECIDE)
    (folder / "config.json").write_text(json.dumps({**DATADECIDE, "d_model": 32}))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 16\]"):
        load_model(folder)
