"""Exported weights: the same whatever the pieces and workers that they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import run_together, tiny_model

from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model
from ke_ray.training.export import export_model, weight_pieces
from ke_ray.training.parallel import Worker, wrap_model


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_a_model_is_written_piece_by_piece(kind: str, tiny_decoder, tmp_path: Path) -> None:
    model = tiny_decoder(kind)
    sizes = [len(piece) for piece in weight_pieces(model, max_bytes=1)]
    assert len(sizes) > model.config.num_hidden_layers
    save_model(model, tmp_path / "m", pieces=weight_pieces(model, max_bytes=1))
    names = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert names == [
        f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))
    ]
    assert weights_sha256(tmp_path / "m") == tensors_sha256(model.state_dict())
    loaded = load_model(tmp_path / "m").state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in model.state_dict().items())


def export_shards(worker: Worker, folder: str) -> None:
    model = wrap_model(tiny_model(), worker, strategy="fsdp", precision="float32")
    export_model(model, folder, worker)


def test_shards_are_exported_whole(tmp_path: Path) -> None:
    assert run_together(tmp_path, 2, export_shards, str(tmp_path / "m")) == [None, None]
    assert weights_sha256(tmp_path / "m") == tensors_sha256(tiny_model().state_dict())
