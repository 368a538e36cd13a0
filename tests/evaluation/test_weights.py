"""``ke-ray weights``: every matrix of every checkpoint, resumed, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.core.spectrum import matrix_geometry
from ke_ray.errors import KeRayError, ResultsError, UserError
from ke_ray.evaluation.weights import _Opened, measure_weights
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model
from ke_ray.models.weight_matrices import weight_matrices
from ke_ray.results import ScanFolder, new_manifest

STEPS = ["step10", "step20", "step30"]


def make_scan(folder: Path, series: Path | str) -> Path:
    """The manifest of a scan of some of the tiny series, which is what the command reads."""
    refs = list_checkpoints(str(series), steps=":30")
    manifest = new_manifest("scan", {"checkpoints": {"spec": str(series), "steps": ":30"}}) | {
        "identity": {"corpora": {}},
        "checkpoints": [
            {"name": ref.name, "weights_fingerprint": ref.weights_fingerprint} for ref in refs
        ],
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def scan_folder(series: Path, tmp_path: Path) -> Path:
    return make_scan(tmp_path / "scan", series)


def finished(folder: Path) -> list[tuple[str, bool]]:
    """What a run of the command did: (checkpoint, whether it is well)."""
    seen: list[tuple[str, bool]] = []
    measure_weights(str(folder), lambda name, error: seen.append((name, error is None)))
    return seen


def test_the_table_has_every_matrix_and_its_distances(scan_folder, series):
    command = [sys.executable, "-m", "ke_ray", "weights", str(scan_folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "step30: done" in result.stderr) == (0, True), result.stderr
    frame = parquet.read_table(scan_folder / "weights.parquet").to_pandas()
    assert len(frame) == 3 * 2 * 7, "checkpoints, layers, matrices of a gated decoder"
    assert (frame["part"] == "attention").sum() == 3 * 2 * 4
    files = {name: load_file(series / name / "model.safetensors") for name in STEPS}
    name = "mlp.down_proj"
    own = frame[(frame["matrix"] == name) & (frame["layer"] == 1)].set_index("checkpoint")
    weights = {step: files[step][f"model.layers.1.{name}.weight"].double() for step in STEPS}
    for step in STEPS:
        assert own.loc[step, "per"] == pytest.approx(matrix_geometry(weights[step]).per)
    for column, origin in (("first", "step10"), ("previous", "step20")):
        change = torch.linalg.norm(weights["step30"] - weights[origin]).item()
        assert own.loc["step30", f"distance_from_{column}"] == pytest.approx(change)
    assert own.loc["step10", ["distance_from_first", "distance_from_previous"]].isna().all()


def test_a_second_run_does_what_is_missing_and_ends_with_the_same_table(scan_folder):
    assert finished(scan_folder) == [(step, True) for step in STEPS]
    path = scan_folder / "weights.parquet"
    whole = parquet.read_table(path)
    parquet.write_table(
        whole.filter([name == "step10" for name in whole["checkpoint"].to_pylist()]), path
    )
    assert finished(scan_folder) == [("step20", True), ("step30", True)]
    assert parquet.read_table(path).equals(whole)
    assert finished(scan_folder) == []


def test_a_broken_checkpoint_is_a_row_and_the_next_one_has_distances(series, tmp_path):
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    weights = copy / "step20" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    folder = make_scan(tmp_path / "scan", copy)
    assert finished(folder) == [("step10", True), ("step20", False), ("step30", True)]
    frame = parquet.read_table(folder / "weights.parquet").to_pandas()
    broken = frame[frame["status"] == "failed"]
    assert broken["checkpoint"].to_list() == ["step20"]
    assert "truncated" in broken["error"].iloc[0]
    last = frame[frame["checkpoint"] == "step30"]
    assert last["distance_from_previous"].equals(last["distance_from_first"])


def test_weights_that_have_changed_since_the_scan_are_refused(series, tmp_path):
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    folder = make_scan(tmp_path / "scan", copy)
    shutil.copy(copy / "step10" / "model.safetensors", copy / "step20" / "model.safetensors")
    with pytest.raises(ResultsError, match=r"1 checkpoints have changed.*'step20'"):
        finished(folder)
    assert not (folder / "weights.parquet").exists()


def test_the_native_layout_has_the_matrices_of_the_other(series, tmp_path):
    native = tmp_path / "native"
    save_model(load_model(series / "step10"), native, layout="native")
    expected, matrices = weight_matrices(series / "step10"), weight_matrices(native)
    assert list(matrices) == list(expected)
    assert all(torch.equal(matrices[key], expected[key]) for key in expected)


def table_of(folder: Path):
    return parquet.read_table(folder / "weights.parquet")


@pytest.mark.parametrize("name", STEPS[:2])
def test_a_checkpoint_mended_later_leaves_the_table_of_an_undisturbed_run(series, tmp_path, name):
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    folder, whole = (make_scan(tmp_path / part, copy) for part in ("scan", "whole"))
    finished(whole)
    hidden = copy / name / "model.hidden"
    (copy / name / "model.safetensors").rename(hidden)
    (copy / name / "model.safetensors").write_bytes(hidden.read_bytes()[:-100])
    assert (name, False) in finished_unchecked(folder)
    hidden.rename(copy / name / "model.safetensors")
    assert finished(folder) == [(step, True) for step in STEPS[STEPS.index(name) :]]
    assert table_of(folder).equals(table_of(whole))


def finished_unchecked(folder: Path) -> list[tuple[str, bool]]:
    """The same on weights that are broken for now, of which the scan has no fingerprint."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["checkpoints"]:
        entry["weights_fingerprint"] = None
    path.write_text(json.dumps(manifest))
    return finished(folder)


def test_checkpoints_of_another_series_are_no_baseline(scan_folder):
    """The Hub does not tell the series of a revision; the results do."""
    scan = ScanFolder.open(str(scan_folder))
    for name, size in zip(STEPS, ("small", "large", "small"), strict=True):
        row = {"checkpoint": name, "series": size, "corpus": "c", "status": "ok", "layer": None}
        scan.write_part(name, [row | {"measure": "gini", "value": 1.0}])
    finished(scan_folder)
    rows = table_of(scan_folder).to_pylist()
    previous = {row["checkpoint"]: row["previous_checkpoint"] for row in rows}
    assert previous == {"step10": None, "step20": None, "step30": "step10"}


def test_checkpoints_outside_the_last_spec_are_counted_and_named(scan_folder, caplog):
    path = scan_folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["checkpoints"]["steps"] = "20:30"
    path.write_text(json.dumps(manifest))
    assert finished(scan_folder) == [("step20", True), ("step30", True)]
    assert "1 checkpoints" in caplog.text
    assert "'step10'" in caplog.text


@pytest.fixture
def remote(series: Path):
    """The series in a file system that is not local, and its size in bytes per checkpoint."""
    memory = fsspec.filesystem("memory")
    for name in STEPS:
        memory.put(str(series / name), f"/weights_test/{name}", recursive=True)
    yield "memory://weights_test"
    memory.rm("/weights_test", recursive=True)


def test_a_cache_that_cannot_hold_what_is_open_is_refused(remote, tmp_path):
    folder = make_scan(tmp_path / "scan", remote)
    with pytest.raises(UserError, match=r"--cache-bytes is 1,000, but 3 checkpoints.*at least"):
        measure_weights(
            str(folder), lambda *_: None, cache_dir=str(tmp_path / "cache"), cache_bytes=1000
        )


def test_a_checkpoint_that_cannot_be_read_is_released(remote, tmp_path):
    refs = list_checkpoints(remote)
    with Store(tmp_path / "cache") as store:
        config = Path(store.fetch(refs[0])) / "config.json"
        store.release(refs[0])
        config.write_text("{}")
        with pytest.raises(KeRayError):
            _Opened(store).matrices(refs[0])
        assert not any(store._leases.values())
