"""What scorers return becomes files while further results are taken."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from results_on_s3 import collector_for, output_of

from ke_ray import storage
from ke_ray.errors import ResultsError, StorageError
from ke_ray.outcomes import ScanOutcome
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.storage.ownership import LOCK, claimed


def test_a_slow_write_holds_up_neither_results_nor_other_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part, second = ScanFolder.write_part, threading.Event()

    def write(self: ScanFolder, checkpoint: str, *parts: Any) -> None:
        if checkpoint == "step0":
            assert second.wait(60)  # it ends after the one that comes later
        write_part(self, checkpoint, *parts)
        second.set()

    monkeypatch.setattr(ScanFolder, "write_part", write)
    outcome = ScanOutcome(str(tmp_path))
    with collector_for(str(tmp_path), 2, outcome) as collector:
        for number in range(2):
            collector.add(output_of(number, n_layers=1, d_mlp=8))
    assert outcome.num_done == 2
    folder = ScanFolder(str(tmp_path), {"identity": {"corpora": {"text": ""}}})
    assert set(folder.entropy()["checkpoint"].to_pylist()) == {"step0", "step1"}
    assert len(folder.list_coefficients()) == 2


def test_a_checkpoint_that_cannot_be_written_ends_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(ScanFolder, "write_part", refuse)
    outcome = ScanOutcome(str(tmp_path))
    with (
        pytest.raises(StorageError, match="disk is full"),
        collector_for(str(tmp_path), 1, outcome) as collector,
    ):
        collector.add(output_of(0, n_layers=1, d_mlp=8))
    assert outcome.num_done == 0


def test_a_command_whose_lease_was_taken_over_folds_nothing_away(s3: str) -> None:
    output = f"{s3}/{uuid.uuid4().hex}"
    with claimed(output, "scan"):
        with collector_for(output, 1, ScanOutcome(output)) as collector:
            collector.add(output_of(0, n_layers=1, d_mlp=8))
        parts = storage.list_dir(f"{output}/parts")
        other = {"ke_ray": "lock", "token": "other", "renewed_at": 0.0}
        storage.write_atomic(f"{output}/{LOCK}", json.dumps(other))
        folder = ScanFolder(output, {"identity": {"corpora": {"text": ""}}})
        with pytest.raises(ResultsError, match="took over"):
            folder.consolidate(final=True)
    assert len(parts) == 2
    assert storage.list_dir(f"{output}/parts") == parts
    assert "entropy.parquet" not in storage.list_dir(output)
