"""Series of a scan, and the paired error of a change."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import synthetic
from rich.console import Console

from ke_ray import storage
from ke_ray.report import series
from ke_ray.report.ceiling import Ceiling
from ke_ray.report.charts.scan import scan_figures
from ke_ray.report.sources import find_results
from ke_ray.report.terminal import print_results


def test_the_paired_error_is_smaller_than_the_unpaired_one(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    change = series.paired_change(scan, "knowledge_entropy", "biographies")
    total = series.totals(scan, "knowledge_entropy", "biographies")
    assert change["value"].iloc[0] == 0.0
    assert change["value"].iloc[-1] == pytest.approx(
        total["value"].iloc[-1] - total["value"].iloc[0]
    )
    unpaired = np.hypot(total["stderr"].iloc[0], total["stderr"].iloc[-1])
    assert 0 < change["stderr"].iloc[-1] < unpaired


def test_without_replicates_the_error_is_unknown_not_zero(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    (folder / "replicates.parquet").unlink()
    change = series.paired_change(find_results([folder])[0], "gini", "a")
    assert np.isnan(change["stderr"].iloc[1])


def test_layers_add_up_to_the_total(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    order, matrix = series.layer_matrix(scan, "knowledge_entropy", "biographies")
    total = series.totals(scan, "knowledge_entropy", "biographies")
    assert matrix.shape == (4, 8)
    np.testing.assert_allclose(matrix.sum(0), total["value"], rtol=1e-12)
    assert list(order["step"]) == [0, 10, 20, 40, 80, 160, 320, 640]


def test_checkpoints_without_steps_are_placed_in_order(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "entropy.parquet")
    place = table.schema.get_field_index("step")
    nulls = pa.nulls(len(table), pa.int64())
    pq.write_table(table.set_column(place, "step", nulls), folder / "entropy.parquet")
    assert list(series.checkpoints(find_results([folder])[0])["x"]) == [0.0, 1.0]


def test_coefficients_and_ceiling(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    array = series.coefficients(scan, "step640")
    assert array is not None
    assert array.shape == (4, 64)
    assert series.coefficients(scan, "step640", "held_out") is not None
    assert series.coefficients(scan, "absent") is None
    bound = series.ceiling(scan)
    assert bound is not None
    assert bound.nats == pytest.approx(4 * np.log(64))


def test_the_ceiling_is_found_without_the_manifest(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    bare = dataclasses.replace(scan, manifest={})
    assert series.ceiling(bare) == series.ceiling(scan)
    assert series.ceiling(dataclasses.replace(bare, path="/nowhere")) is None


def test_settings_are_found_where_the_scan_keeps_them(scan_folder: Path) -> None:
    scan = find_results([scan_folder])[0]
    assert series.setting(scan, "dormant_threshold") == 0.1
    nested = dataclasses.replace(scan, manifest={"identity": {"dormant_threshold": 0.2}})
    assert series.setting(nested, "dormant_threshold") == 0.2
    assert series.setting(nested, "absent") is None


def _with_columns(folder: Path, **columns: list) -> Path:
    """The scan with further columns, given for each of its checkpoints in turn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "entropy.parquet")
    names = table["checkpoint"].to_pylist()
    order = list(dict.fromkeys(names))
    for column, values in columns.items():
        by_name = dict(zip(order, values, strict=True))
        cells = pa.array([by_name[name] for name in names])
        if column in table.column_names:
            table = table.set_column(table.column_names.index(column), column, cells)
        else:
            table = table.append_column(column, cells)
    pq.write_table(table, folder / "entropy.parquet")
    return folder


def test_several_sizes_are_several_curves_each_with_its_ceiling(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1, 2, 3], corpora=("a",))
    labels = ["olmo, small", "olmo, large"] * 2
    _with_columns(folder, series=labels, n_layers=[4, 8] * 2, d_mlp=[64, 128] * 2)
    scan = find_results([folder])[0]
    curves = series.curves(scan)
    assert [label for label, _ in curves] == ["olmo, large", "olmo, small"]
    assert [list(series.checkpoints(c)["step"]) for _, c in curves] == [[1, 3], [0, 2]]
    bounds = [series.ceiling(curve) for _, curve in curves]
    assert bounds == [Ceiling(((8, 128),)), Ceiling(((4, 64),))]
    changes = [series.paired_change(c, "gini", "a")["value"].iloc[0] for _, c in curves]
    assert changes == [0.0, 0.0]
    (figure, *_) = scan_figures(scan, "scan")
    rows = figure.panels[0].view.rows
    drawn = {name: list(part["x"]) for name, part in rows.groupby("series")}
    assert drawn == {"olmo, large: a": [1, 3], "olmo, small: a": [0, 2]}
    assert "2 curves" in figure.caption
    assert figure.caption.count("ceiling") == 2


def test_stages_follow_on_along_a_curve_and_branches_are_curves(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[10, 20, 30, 40, 50, 60], corpora=("a",))
    branches = [None, None, "ingredient1", "ingredient1", "ingredient2", None]
    steps, stages = [10, 20, 10, 20, 10, None], [1, 1, 2, 2, 2, None]
    _with_columns(folder, step=steps, stage=stages, branch=branches)
    scan = find_results([folder])[0]
    assert [(label, list(series.checkpoints(c)["x"])) for label, c in series.curves(scan)] == [
        ("stages in common", [10, 20, 50]),  # the last one without a step, one interval on
        ("ingredient1", [30, 40]),
        ("ingredient2", [30]),
    ]
    assert series.unit(scan) == "stage step"
    assert series.borders(scan) == {20.0: "stage 2"}
    text = io.StringIO()
    print_results([folder], Console(file=text, width=120))
    assert text.getvalue().count("first") == 3
    # A branch of its own goes on along the run.
    _with_columns(folder, branch=[*branches[:4], None, None])
    ((label, curve),) = series.curves(find_results([folder])[0])
    assert (label, list(series.checkpoints(curve)["x"])) == ("", [10, 20, 30, 30, 40, 50])


def test_ingredients_of_older_folders_are_branches(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[1, 2], corpora=("a",))
    _with_columns(folder, stage=[2, 2], ingredient=[1, 3])
    labels = [label for label, _ in series.curves(find_results([folder])[0])]
    assert labels == ["ingredient1", "ingredient3"]


def _drawn(scan, measure: str = "gini") -> dict[str, list[float]]:
    """x of each drawn curve, in the order in which it is drawn."""
    figure = next(f for f in scan_figures(scan, "scan") if f.id == f"scan-{measure}")
    rows = figure.panels[0].view.rows
    return {str(name): list(part["x"]) for name, part in rows.groupby("series", sort=False)}


def test_tokens_over_all_stages_are_the_axis_where_they_are_known(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[1, 2, 3, 4], corpora=("a",))
    tokens = [4_000, 8_000, 9_000, 10_000]
    _with_columns(folder, step=[1, 2, 1, 2], stage=[1, 1, 2, 2], tokens=tokens)
    scan = find_results([folder])[0]
    assert series.unit(scan) == "tokens"
    assert _drawn(scan) == {"a": tokens}
    figure = next(f for f in scan_figures(scan, "scan") if f.id == "scan-knowledge-entropy")
    assert "Dotted lines mark where a stage of training ends" in figure.caption
    plot = figure.panels[0].view.chart.to_dict()
    assert "stage 2 →" in str(plot)
    assert "pretraining tokens" in str(plot)


def test_several_seeds_are_curves_with_their_mean_and_range_and_never_a_zigzag(tmp_path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[1, 2, 3, 4, 5, 6, 7], corpora=("a",))
    seeds = ["default", "default", "default", "aux-2", "aux-2", "aux-3", "aux-3"]
    _with_columns(folder, step=[0, 10, 20, 0, 10, 0, 10], seed=seeds)
    scan = find_results([folder])[0]
    drawn = _drawn(scan)
    assert drawn == {
        "seed aux-2: a": [0, 10],
        "seed aux-3: a": [0, 10],
        "seed default: a": [0, 10, 20],
        "mean of 3 seeds: a": [0, 10],  # where all three are
    }
    figure = next(f for f in scan_figures(scan, "scan") if f.id == "scan-gini")
    rows = figure.panels[0].view.rows
    single = rows[rows["mark"] == "thin"]
    mean = rows[rows["series"] == "mean of 3 seeds: a"].set_index("x")
    for x, part in single[single["x"] < 20].groupby("x"):
        assert mean.loc[x, "value"] == pytest.approx(part["value"].mean())
        ends = (mean.loc[x, "low"], mean.loc[x, "high"])
        assert ends == (part["value"].min(), part["value"].max())
    assert single["low"].isna().all()
    assert figure.caption.startswith("Bands: the range over seeds. 3 curves")
    assert "Thin lines are single seeds" in figure.caption
    lines = [layer["mark"] for layer in figure.panels[0].view.chart.to_dict()["layer"]]
    assert any(mark.get("strokeWidth") == 1 and mark["type"] == "line" for mark in lines)


def test_words_and_tokens_are_axes_where_no_name_counts_steps(tmp_path: Path) -> None:
    for unit in ("words", "tokens"):
        folder = synthetic.make_scan(tmp_path / unit, steps=[1, 2, 3], corpora=("a",))
        _with_columns(folder, step=[None] * 3, **{unit: [1_000, 10_000, 100_000]})
        scan = find_results([folder])[0]
        assert series.unit(scan) == unit
        assert _drawn(scan) == {"a": [1_000, 10_000, 100_000]}


def test_one_series_is_one_curve_also_with_a_final_checkpoint_and_older_rows(tmp_path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[1, 2, 3], corpora=("a",))
    assert [label for label, _ in series.curves(find_results([folder])[0])] == [""]
    _with_columns(folder, step=[1, 2, None], series=[None, "olmo", "olmo"], stage=[1, 1, None])
    assert [label for label, _ in series.curves(find_results([folder])[0])] == [""]


def test_the_paired_error_uses_the_groups_of_the_manifest(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    equal = series.paired_change(find_results([folder])[0], "gini", "a")["stderr"].iloc[1]
    manifest = storage.read_json(str(folder / "manifest.json"))
    about = manifest["corpora"]["a"]
    about["group_sizes"] = [2] * 6 + [1] * 58
    about |= {"sampling": "first", "stderr_factor": 2.84}
    storage.write_json(str(folder / "manifest.json"), manifest)
    scan = find_results([folder])[0]
    sized = series.paired_change(scan, "gini", "a")["stderr"].iloc[1]
    assert np.isfinite(sized)
    assert sized != equal
    caution = series.caution(scan, "a")
    assert caution is not None
    assert "2.8 times too small" in caution
    about["stderr_factor"] = 1.0
    storage.write_json(str(folder / "manifest.json"), manifest)
    assert series.caution(find_results([folder])[0], "a") is None
