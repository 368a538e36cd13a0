"""The canonical hash: one value for all layouts of the same weights, another for any other."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ke_ray.checkpoints.formats.fingerprint import (
    HashingStoppedError,
    tensors_sha256,
    weights_sha256,
)
from ke_ray.errors import CheckpointError
from ke_ray.models.saving import save_model


def rename(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(dict(change(load_file(path).items())), path)


def test_it_is_the_formula_in_the_docstring() -> None:
    tensors = {"model.b": torch.tensor([[1.0, -2.5]]), "model.a": torch.tensor([3.0])}

    def line(name: str, shape: str, *values: float) -> bytes:
        digest = hashlib.sha256(struct.pack(f"<{len(values)}f", *values)).digest()
        return f"{name}\0{shape}\0".encode() + digest + b"\n"

    expected = hashlib.sha256(line("a", "1", 3.0) + line("b", "1,2", 1.0, -2.5)).hexdigest()
    assert tensors_sha256(tensors) == expected


@pytest.mark.parametrize("family", ["olmo", "llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_file_layout_does_not_enter(tmp_path: Path, tiny_decoder, family: str) -> None:
    model = tiny_decoder(family)
    save_model(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    save_model(model, tmp_path / "bin")
    tensors = load_file(tmp_path / "bin" / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    hashes = {weights_sha256(tmp_path / name) for name in ("one", "shards", "bin")}
    hashes.add(tensors_sha256(model.state_dict()))
    assert len(hashes) == 1


def test_prefix_of_the_base_model_does_not_enter(tmp_path: Path, tiny_decoder) -> None:
    for family, prefix in (("gpt2", "transformer."), ("olmo", "model."), ("gpt_neox", "gpt_neox.")):
        folder = tmp_path / family
        save_model(tiny_decoder(family), folder)
        before = weights_sha256(folder)
        rename(folder, lambda items, p=prefix: ((n.removeprefix(p), t) for n, t in items))
        assert not any(name.startswith(prefix) for name in load_file(folder / "model.safetensors"))
        assert weights_sha256(folder) == before


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_do_not_enter(tmp_path: Path, tiny_decoder, prefix: str) -> None:
    model = tiny_decoder("llama")
    save_model(model, tmp_path)
    before = weights_sha256(tmp_path)
    rename(tmp_path, lambda items: ((prefix + name, tensor) for name, tensor in items))
    assert weights_sha256(tmp_path) == before
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert tensors_sha256(state) == before


def test_a_tied_head_may_be_stored_or_not(tmp_path: Path, tiny_decoder) -> None:
    save_model(tiny_decoder("olmo", tie_word_embeddings=True), tmp_path / "x")
    before = weights_sha256(tmp_path / "x")
    embedding = load_file(tmp_path / "x" / "model.safetensors")["model.embed_tokens.weight"]
    rename(tmp_path / "x", lambda items: [*items, ("lm_head.weight", embedding.clone())])
    assert weights_sha256(tmp_path / "x") == before
    rename(tmp_path / "x", lambda items: dict(items) | {"lm_head.weight": embedding + 1})
    assert weights_sha256(tmp_path / "x") != before


def test_stored_constants_do_not_enter(tmp_path: Path, tiny_decoder) -> None:
    save_model(tiny_decoder("gpt2"), tmp_path / "x")
    before = weights_sha256(tmp_path / "x")
    mask = ("transformer.h.0.attn.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool))
    rename(tmp_path / "x", lambda items: [*items, mask])
    assert weights_sha256(tmp_path / "x") == before


def test_half_precision_files_are_hashed_by_value(tmp_path: Path, tiny_decoder) -> None:
    model = tiny_decoder("llama").bfloat16()
    save_model(model, tmp_path / "bf16")
    save_model(model.float(), tmp_path / "f32")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("bf16", "f32")]
    assert sizes[0] < 0.7 * sizes[1]
    assert weights_sha256(tmp_path / "bf16") == weights_sha256(tmp_path / "f32")


def test_any_changed_bit_shape_or_name_changes_it(tiny_decoder) -> None:
    base = {name: t.clone() for name, t in tiny_decoder("olmo").state_dict().items()}
    seen = {tensors_sha256(base)}
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (
        base[name].nextafter(torch.tensor(9.0)),
        base[name].reshape(-1),
        base[name].T.contiguous(),
    ):
        seen.add(tensors_sha256(base | {name: value}))
    swapped = base | {name: base["model.layers.0.mlp.up_proj.weight"]}
    seen.add(tensors_sha256(swapped | {"model.layers.0.mlp.up_proj.weight": base[name]}))
    assert len(seen) == 5


def test_pieces_do_not_enter() -> None:
    large = torch.arange(3 * 2**20 + 17, dtype=torch.float32)
    digest = hashlib.sha256(large.numpy().tobytes()).digest()
    line = f"a\0{large.numel()}\0".encode() + digest + b"\n"
    assert tensors_sha256({"a": large}) == hashlib.sha256(line).hexdigest()


def test_it_can_be_stopped(tiny_decoder) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(HashingStoppedError):
        tensors_sha256(tiny_decoder("olmo").state_dict(), should_stop=stop)
    assert len(asked) == 4


def test_what_cannot_be_hashed_is_an_error(tmp_path: Path, tiny_decoder) -> None:
    with pytest.raises(CheckpointError, match="both called 'a'"):
        tensors_sha256({"a": torch.zeros(1), "model.a": torch.zeros(1)})
    save_model(tiny_decoder("olmo"), tmp_path / "x", layout="native")
    rename(tmp_path / "x", lambda items: list(items)[1:])
    with pytest.raises(CheckpointError, match="missing"):
        weights_sha256(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").write_bytes(
        b"\x10\0\0\0\0\0\0\0" + json.dumps({}).encode()
    )
    with pytest.raises(CheckpointError, match="truncated"):
        weights_sha256(tmp_path / "x")


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_have_one_hash_fused_in_memory_and_as_files_store_them(
    tmp_path, tiny_decoder, model_type
):
    model = tiny_decoder(model_type)
    model.save_pretrained(tmp_path / "files")
    before = weights_sha256(tmp_path / "files")
    assert before == tensors_sha256(model.state_dict())
    layer = model.model.layers[1].mlp.experts
    layer.gate_up_proj.data[[0, 1]] = layer.gate_up_proj.data[[1, 0]]  # experts change places
    assert tensors_sha256(model.state_dict()) != before
    model.save_pretrained(tmp_path / "swapped")
    assert weights_sha256(tmp_path / "swapped") == tensors_sha256(model.state_dict())
