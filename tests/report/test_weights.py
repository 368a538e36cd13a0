"""The figure of weights: lines are means over layers of what the table holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from ke_ray.report.charts.figure import figure_of
from ke_ray.report.charts.weights import weight_figures
from ke_ray.report.sources import find_results
from ke_ray.results.columns import to_table


def test_a_line_is_the_mean_over_layers_of_one_matrix(scan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scan"
    shutil.copytree(scan_folder, folder)
    rows = [
        {
            "checkpoint": f"step{step}",
            "step": step,
            "layer": layer,
            "part": "ffn",
            "matrix": matrix,
            "per": 0.1 * layer + step / 1000 + (0.5 if matrix == "mlp.up_proj" else 0.0),
            "status": "ok",
        }
        for step in (10, 20)
        for layer in range(3)
        for matrix in ("mlp.up_proj", "mlp.down_proj")
    ]
    rows.append({"checkpoint": "step40", "status": "failed", "error": "truncated"})
    parquet.write_table(to_table("weights", rows), folder / "weights.parquet")
    scan = find_results([folder])[0]
    assert not any("weights" in note for note in scan.notes)

    def figure(name: str, **parts: object):
        return figure_of(scan, "scan", name, **parts)

    (drawn,) = weight_figures(scan, "step", figure)
    assert [panel.key for panel in drawn.panels] == [("PER",)]
    values = drawn.panels[0].view.rows.set_index(["series", "x"])["value"]
    assert values["mlp.down_proj", 20] == pytest.approx(100 * (0.1 + 0.02)), "in per cent"
    assert values["mlp.up_proj", 10] == pytest.approx(100 * (0.1 + 0.01 + 0.5))
    assert len(values) == 4


def test_a_scan_without_weights_has_no_such_figure(scan_folder: Path) -> None:
    assert weight_figures(find_results([scan_folder])[0], "step", lambda *_, **__: None) == []
