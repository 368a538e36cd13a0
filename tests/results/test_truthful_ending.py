"""What a manifest says of a command that ended in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from ke_ray.errors import ConfigError, StorageError
from ke_ray.results.manifest import new_manifest, read_manifest, truthful_ending, write_manifest


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("broke"), "failed"),
        (StorageError("the disk is full"), "failed"),
        (ConfigError("the request was wrong, and nothing ran"), "running"),
    ],
)
def test_a_running_study_does_not_stay_running(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    folder = str(tmp_path)
    write_manifest(folder, new_manifest("pretrain", {}))
    with pytest.raises(type(error)), truthful_ending(folder):
        raise error
    assert read_manifest(folder)["status"] == status
