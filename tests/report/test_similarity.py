"""The checkpoint × checkpoint map: its cells are those of ``ke-ray compare``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import synthetic

from ke_ray.core.similarity import NAMES
from ke_ray.report.charts import similarity
from ke_ray.report.sources import find_results
from ke_ray.results import comparison


def test_cells_are_the_means_over_layers_that_the_command_writes(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    rows = similarity.similarity_rows(scan, "held_out").set_index(["checkpoint", "other"])
    tables = [table.to_pandas() for table in comparison.compare([str(scan_folder)])]
    pairs = pd.concat(tables)
    pairs = pairs[pairs["layer"].isna() & (pairs["from_corpus"] == "held_out")]
    pairs = pairs[pairs["to_corpus"] == "held_out"]
    assert len(pairs) == 8 * 7 / 2
    for pair in pairs.to_dict("records"):
        cell = rows.loc[(pair["from_checkpoint"], pair["to_checkpoint"])]
        mirrored = rows.loc[(pair["to_checkpoint"], pair["from_checkpoint"])]
        for name in NAMES:
            assert cell[name] == pytest.approx(pair[name])
            assert mirrored[name] == pytest.approx(pair[name])


def test_a_long_series_is_thinned_to_a_map_that_can_be_read(tmp_path: Path) -> None:
    steps = list(range(0, 600, 10))
    folder = synthetic.make_scan(tmp_path / "long", steps=steps, corpora=("wiki",), n_layers=1)
    rows = similarity.similarity_rows(find_results([folder])[0], None)
    assert rows["checkpoint"].nunique() == 24
    assert rows["checkpoint"].iloc[0] == "step0"
    assert rows["checkpoint"].iloc[-1] == "step590"
