"""Checkpoints are written whole, read back exactly, and never over something else."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
import tokenizers
import torch

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.checkpoints.reference import find_tokenizer
from ke_ray.errors import StorageError
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_bit(tmp_path: Path, tiny_decoder, layout, dtype) -> None:
    model = tiny_decoder("olmo2").to(dtype)
    save_model(model, tmp_path / "x", layout=layout)
    loaded = load_model(tmp_path / "x", dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert weights_sha256(tmp_path / "x") == tensors_sha256(model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_tokenizer_goes_along(tmp_path: Path, tiny_decoder) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model = tiny_decoder("olmo")
    save_model(model, tmp_path / "one", tokenizer=tokenizer)
    save_model(model, tmp_path / "two", tokenizer=tmp_path / "one", layout="native")
    save_model(model, tmp_path / "three", tokenizer=tmp_path / "one" / "tokenizer.json")
    texts = {find_tokenizer(tmp_path / name).read_text() for name in ("one", "two", "three")}
    assert texts == {(tmp_path / "one" / "tokenizer.json").read_text()}
    with pytest.raises(StorageError, match="no tokenizer"):
        save_model(model, tmp_path / "four", tokenizer=tmp_path)
    assert not (tmp_path / "four").exists()


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, tiny_decoder) -> None:
    save_model(tiny_decoder("olmo"), tmp_path / "x", layout="native")
    first = weights_sha256(tmp_path / "x")
    other = tiny_decoder("olmo", seed=1)
    with pytest.raises(StorageError, match="already exists.*another folder"):
        save_model(other, tmp_path / "x")
    assert weights_sha256(tmp_path / "x") == first
    save_model(other, tmp_path / "x", overwrite=True)
    assert weights_sha256(tmp_path / "x") == tensors_sha256(other.state_dict())
    assert not (tmp_path / "x" / "config.yaml").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_forbidden_folder(tmp_path: Path, tiny_decoder) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission|Permission"):
        save_model(tiny_decoder("olmo"), tmp_path / "x")


def test_a_file_in_the_way(tmp_path: Path, tiny_decoder) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        save_model(tiny_decoder("olmo"), tmp_path / "file" / "x")
    with pytest.raises(StorageError, match="already exists.*another folder"):
        save_model(tiny_decoder("olmo"), tmp_path / "file")


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_saved_to_a_uri_listed_and_fetched_from_it(tmp_path: Path, tiny_decoder, layout) -> None:
    base = f"memory://saving-{layout}/run"
    models = [tiny_decoder("olmo", seed=seed) for seed in (0, 1)]
    for step, model in enumerate(models):
        save_model(model, f"{base}/step{step}", layout=layout)
    refs = list_checkpoints(base)
    assert [(ref.step, ref.format) for ref in refs] == [(0, layout), (1, layout)]
    with Store(tmp_path / "cache") as store:
        for ref, model in zip(refs, models, strict=True):
            assert weights_sha256(store.fetch(ref)) == tensors_sha256(model.state_dict())
    assert list_checkpoints(f"{base}/step*")[1].step == 1
    save_model(models[1], f"{base}/step0", layout=layout, overwrite=True)
    with pytest.raises(StorageError, match="already exists.*another folder"):
        save_model(models[0], f"{base}/step1")
    fsspec.filesystem("memory").rm(f"/saving-{layout}", recursive=True)
