"""``ke-ray compare``: every pair from the coefficient files, and what cannot be compared."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import synthetic

from ke_ray.core import similarity
from ke_ray.errors import ResultsError
from ke_ray.results import ScanFolder, comparison


def ke_ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ke_ray", "compare", *map(str, arguments)]
    wide = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=wide)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    steps = [0, 10, 20, 40, 80]
    return synthetic.make_scan(tmp_path_factory.mktemp("compare") / "scan", steps=steps)


def frame_of(*folders: Path, **keys: int):
    import pyarrow as pa

    tables = comparison.compare([str(folder) for folder in folders], **keys)
    return pa.concat_tables(tables).to_pandas()


def test_the_file_has_every_pair_of_checkpoints_and_corpora_by_layer(folder, tmp_path):
    result = ke_ray(folder, "--output", tmp_path / "pairs.parquet")
    assert result.returncode == 0, result.stderr
    assert "step0 on biographies" in result.stdout
    assert "Jensen–Shannon" in result.stdout
    frame = parquet.read_table(tmp_path / "pairs.parquet").to_pandas()
    # 10 pairs of 5 checkpoints on each of 2 corpora, and 5 pairs of corpora; 4 layers and the mean.
    assert len(frame) == (2 * 10 + 5) * (4 + 1)
    row = frame[
        (frame["from_checkpoint"] == "step10")
        & (frame["to_checkpoint"] == "step80")
        & (frame["to_corpus"] == "held_out")
    ].set_index("layer")
    scan = ScanFolder.open(str(folder))
    one, other = (scan.mean_coefficients(name, "held_out") for name in ("step10", "step80"))
    for layer in range(4):
        values = similarity.similarities(one[layer : layer + 1], other[layer : layer + 1])
        expected = {name: value.item() for name, value in values.items()}
        assert row.loc[layer, list(similarity.NAMES)].to_dict() == pytest.approx(expected)
    assert row.loc[np.nan, "cosine"] == pytest.approx(row["cosine"].iloc[:4].mean())
    across = frame[frame["from_corpus"] != frame["to_corpus"]]
    assert (across["from_checkpoint"] == across["to_checkpoint"]).all()

    again = ke_ray(folder, "--output", tmp_path / "pairs.parquet")  # never overwritten
    assert (again.returncode, "pairs.parquet' exists" in again.stderr) == (2, True)


def test_csv_has_the_same_rows(folder):
    rows = list(csv.DictReader(ke_ray(folder, "--csv").stdout.splitlines()))
    frame = frame_of(folder)
    assert [row["from_checkpoint"] for row in rows] == frame["from_checkpoint"].to_list()
    assert float(rows[7]["js_distance"]) == pytest.approx(frame["js_distance"].iloc[7])


def test_layers_are_taken_in_passes_that_fit_into_memory(folder, monkeypatch):
    whole = frame_of(folder)
    monkeypatch.setattr(comparison, "_BLOCK_BYTES", 5 * 64 * 4 * 3)  # three of four layers
    assert frame_of(folder).equals(whole)


def test_a_limit_keeps_the_first_and_the_last_checkpoint(folder):
    frame = frame_of(folder, limit=3)
    assert set(frame["from_checkpoint"]) | set(frame["to_checkpoint"]) == {
        *("step0", "step20", "step80")
    }


def test_two_scans_are_compared_by_name_on_their_corpora(folder, tmp_path):
    other = synthetic.make_scan(tmp_path / "other", steps=[20, 80, 160], corpora=("wiki",))
    frame = frame_of(folder, other)
    assert set(frame["from_checkpoint"]) == {"step20", "step80"}
    assert (frame["from_checkpoint"] == frame["to_checkpoint"]).all()
    assert set(frame["from_corpus"]) == {"biographies", "held_out"}
    assert set(frame["to_corpus"]) == {"wiki"}


def test_other_memories_are_refused_in_one_message(folder, tmp_path):
    other = synthetic.make_scan(tmp_path / "wide", steps=[0, 10, 20, 40], n_layers=2, d_mlp=80)
    with pytest.raises(ResultsError, match=r"4 layers of 64 memories.*2 layers of 80.*and 13 more"):
        comparison.compare([str(folder), str(other)])


def test_checkpoints_of_other_seeds_are_not_compared(folder, tmp_path):
    copy = tmp_path / "seeds"
    shutil.copytree(folder, copy)
    table = parquet.read_table(copy / "entropy.parquet").to_pandas()
    table["seed"] = table["checkpoint"].map(
        lambda name: "1" if name in ("step0", "step10") else "2"
    )
    table.to_parquet(copy / "entropy.parquet")
    frame = frame_of(copy)
    pairs = set(zip(frame["from_checkpoint"], frame["to_checkpoint"], strict=True))
    assert ("step0", "step10") in pairs
    assert ("step10", "step20") not in pairs


def test_checkpoints_of_one_name_in_two_runs_are_not_compared(folder, tmp_path):
    other = tmp_path / "other_seed"
    shutil.copytree(folder, other)
    table = parquet.read_table(other / "entropy.parquet").to_pandas()
    table.loc[table["checkpoint"] != "step80", "seed"] = "7"
    table.to_parquet(other / "entropy.parquet")
    assert set(frame_of(folder, other)["from_checkpoint"]) == {"step80"}


def test_a_scan_without_a_pair_is_refused(tmp_path):
    single = synthetic.make_scan(tmp_path / "single", steps=[0], corpora=("wiki",))
    result = ke_ray(single)
    assert result.returncode == 2
    assert "expected at least two" in result.stderr
    with pytest.raises(ResultsError, match="no checkpoint of the same name"):
        comparison.compare([str(single), str(synthetic.make_scan(tmp_path / "later", steps=[10]))])
