"""Fetching in ranges from a real S3 service."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from checkpoint_site import QUICK
from file_host import content

from ke_ray import storage
from ke_ray.checkpoints.fetch.checkpoint import fetch_into
from ke_ray.checkpoints.pieces import arrived_bytes
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import CheckpointError

SIZE = 20 * 2**20 + 12_345


@pytest.fixture
def ref(s3: str) -> CheckpointRef:
    location = f"{s3}/{uuid.uuid4().hex}"
    storage.write_atomic(f"{location}/config.json", b"{}")
    storage.write_atomic(f"{location}/model.safetensors", content("one", 0, SIZE))
    return CheckpointRef("x", location, "hf")


def test_what_a_stopped_fetch_brought_is_gone_on_from(ref: CheckpointRef, tmp_path: Path) -> None:
    partial = tmp_path / "model.safetensors.incomplete"
    with pytest.raises(CheckpointError, match="the caller stopped it"):
        fetch_into(ref, tmp_path, policy=QUICK, should_stop=lambda: arrived_bytes(partial) > 0)
    assert 0 < arrived_bytes(partial) < SIZE
    fetch_into(ref, tmp_path, policy=QUICK)
    assert (tmp_path / "model.safetensors").read_bytes() == content("one", 0, SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_object_that_changes_meanwhile_is_fetched_anew(
    ref: CheckpointRef, tmp_path: Path
) -> None:
    changes: list[None] = []

    def change() -> bool:
        if not changes and arrived_bytes(tmp_path / "model.safetensors.incomplete") > 0:
            changes.append(None)
            storage.write_atomic(f"{ref.location}/model.safetensors", content("two", 0, SIZE))
        return False

    fetch_into(ref, tmp_path, policy=QUICK, should_stop=change)
    assert (tmp_path / "model.safetensors").read_bytes() == content("two", 0, SIZE)
