"""What the report says beside its figures is true of the results that it shows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from rich.console import Console

from ke_ray.report import paper
from ke_ray.report.build import sections
from ke_ray.report.charts.comparison import compare_scans, labels, warnings
from ke_ray.report.charts.figure import Figure
from ke_ray.report.correlation import p_value
from ke_ray.report.series import paired_change
from ke_ray.report.sources import Result, find_results, read_result
from ke_ray.report.terminal import print_results

_SWEEPS = Path(__file__).parents[2] / "sweeps"


def _figures(*folders: Path) -> dict[str, Figure]:
    made = sections(find_results(folders))
    return {figure.id: figure for section in made for figure in section.figures}


def _facts(folder: Path) -> dict[str, str]:
    return dict(fact for section in sections(find_results([folder])) for fact in section.facts)


def _rewrite(folder: Path, table: str, **columns: object) -> None:
    frame = pq.read_table(folder / f"{table}.parquet").to_pandas()
    for name, value in columns.items():
        frame[name] = value(frame) if callable(value) else value
    pq.write_table(pa.Table.from_pandas(frame), folder / f"{table}.parquet")


def _identity(folder: Path, **identity: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"identity": identity}))


def _printed(folder: Path) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    print_results([folder], console)
    return console.export_text()


def test_the_papers_correlation_comes_with_its_own_number_of_points(tmp_path: Path) -> None:
    study = synthetic.make_continual(tmp_path / "study", steps=(1, 2, 3, 4, 5), seeds=(0,))
    figures = _figures(study)
    for column, r in paper.CORRELATIONS.items():
        caption = figures[f"continual-correlation-{column}"].caption
        own, published = caption.split("The paper")
        assert "(n = 5;" in own
        assert "n = 10 points" in published
        assert f"p = {p_value(r, 10):.0e}".replace("-", "−") in published
        assert "over four stages" not in caption


def test_the_p_value_is_that_of_the_t_test() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    reference = stats.pearsonr(x, y)
    assert p_value(reference.statistic, 9) == pytest.approx(reference.pvalue)


def test_scans_in_different_dtypes_are_compared_with_a_word(tmp_path: Path) -> None:
    for name, dtype in (("one", "float32"), ("two", "bfloat16")):
        folder = synthetic.make_scan(tmp_path / name, steps=[0, 1], corpora=("a",))
        _identity(folder, measure_version=1, dtype=dtype)
    results = find_results([tmp_path])
    (figure,) = compare_scans(results)
    assert "one: float32; two: bfloat16" in figure.caption
    names = list(figure.panels[0].view.rows["series"].unique())
    assert names == ["one (a, float32)", "two (a, bfloat16)"]
    assert any("float32" in text and "bfloat16" in text for text in warnings(results))


def test_the_same_dtype_needs_no_word(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = synthetic.make_scan(tmp_path / name, steps=[0, 1], corpora=("a",))
        _identity(folder, measure_version=1, dtype="float32")
    results = find_results([tmp_path])
    assert "differ" not in compare_scans(results)[0].caption
    assert warnings(results) == []


def test_resuscitated_checkpoints_are_named_in_a_comparison(tmp_path: Path) -> None:
    for name, settings in (("one", None), ("two", {"ratio": 0.5, "factor": 2.0})):
        folder = synthetic.make_scan(tmp_path / name, steps=[0, 1], corpora=("a",))
        _identity(folder, resuscitation=settings)
    (figure,) = compare_scans(find_results([tmp_path]))
    assert "one: unchanged; two: resuscitated (ratio 0.5, factor 2.0)" in figure.caption


@pytest.mark.parametrize(
    ("setting", "values", "measures"),
    [
        ("measure_version", (1, 2), None),
        ("dormant_threshold", (0.1, 0.2), {"Dormant share"}),
        ("top_k_fraction", (0.01, 0.02), {"Mass of the largest memories"}),
    ],
)
def test_measures_that_are_not_the_same_are_never_laid_over_each_other(
    tmp_path: Path, setting: str, values: tuple[float, float], measures: set[str] | None
) -> None:
    for name, value in zip(("one", "two"), values, strict=True):
        folder = synthetic.make_scan(tmp_path / name, steps=[0, 1], corpora=("a",))
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    results = find_results([tmp_path])
    figures = compare_scans(results)
    shown = {panel.key[0] for figure in figures for panel in figure.panels}
    assert shown == set() if measures is None else not shown & measures and "Gini" in str(shown)
    assert any(setting in text and "must not be compared" in text for text in warnings(results))


def test_results_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [synthetic.make_pretrain(tmp_path / name / "run") for name in ("a", "b")]
    results = [read_result(str(folder), "pretrain") for folder in folders]
    assert list(labels(results).values()) == ["a/run", "b/run"]


def test_a_figure_without_errors_speaks_of_none(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    _rewrite(folder, "entropy", stderr=lambda t: t["stderr"].where(t["measure"] != "dormant_share"))
    (folder / "replicates.parquet").unlink()
    figures = _figures(folder)
    assert "No error band" in figures["scan-dormant-share"].caption
    assert "Student intervals by jackknife" in figures["scan-gini"].caption
    assert "No error band" in figures["scan-changes"].caption


def test_checkpoints_on_different_data_have_no_paired_error(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1, 2], corpora=("a",))
    _rewrite(folder, "entropy", data_sha256=lambda t: np.where(t["step"] == 1, "f", "0"))
    errors = paired_change(find_results([folder])[0], "gini", "a")["stderr"]
    assert np.isnan(errors[1])
    assert errors[2] > 0


def test_a_checkpoint_that_failed_on_two_corpora_is_one(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0], failed=("step2", "step3"))
    rows = pq.read_table(folder / "entropy.parquet").to_pylist()
    rows += [{**row, "corpus": "held_out"} for row in rows if row["status"] == "failed"]
    schema = pq.read_schema(folder / "entropy.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "entropy.parquet")
    assert _facts(folder)["failed checkpoints"] == "2"


def test_a_measure_to_come_is_not_called_unrequested(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    requested = [*manifest["measures"], "knowledge_entropy_relu"]
    path.write_text(json.dumps(manifest | {"measures": requested}))
    (section, *_) = sections(find_results([folder]))
    assert any("ReLU variant: requested, but" in text for text in section.missing)


def test_stopped_trials_are_not_called_failed(tmp_path: Path) -> None:
    folder = synthetic.make_sweep(tmp_path / "sweep", failed=2)
    _rewrite(
        folder,
        "trials",
        status=lambda t: t["status"].where(t["trial_id"] != "x1", "stopped"),
        error=lambda t: t["error"].where(t["trial_id"] != "x1", None),
    )
    facts = _facts(folder)
    assert facts["trials failed"] == facts["trials stopped"] == "1"
    assert "None" not in _printed(folder)


def _with_rates(folder: Path) -> Result:
    _rewrite(
        folder,
        "trials",
        **{"optimizer.learning_rate": lambda t: np.where(t["seed"] == 0, 1e-3, 1e-4)},
    )
    return find_results([folder])[0]


def test_a_mean_over_another_parameter_is_not_called_one_over_seeds(tmp_path: Path) -> None:
    folder = synthetic.make_sweep(tmp_path / "sweep")
    figures = _figures(folder)
    assert "Means over seeds." in figures["sweep-factor-curve"].caption
    _with_rates(folder)
    figures = _figures(folder)
    for name in ("sweep-factor-curve", "sweep-ratio-factor"):
        assert "over seeds and over optimizer.learning_rate" in figures[name].caption
    text = _printed(folder)
    assert "original optimizer.learning_rate=0.001" in text
    assert "original optimizer.learning_rate=0.0001" in text


def test_starts_with_one_run_beside_starts_with_several_have_no_bar(tmp_path: Path) -> None:
    folder = synthetic.make_continual(tmp_path / "study", steps=(1, 2), seeds=(0, 1))
    rows = pq.read_table(folder / "runs.parquet")
    pq.write_table(rows.slice(0, 3), folder / "runs.parquet")
    figure = _figures(folder)["continual-downstream-before-after"]
    rows = figure.panels[0].view.rows
    assert rows.loc[rows["series"] == "after", "low"].notna().tolist() == [True, False]
    assert "where there are several" in figure.caption


def test_injections_are_spoken_of_where_they_are_drawn(tmp_path: Path) -> None:
    folder = synthetic.make_continual(tmp_path / "study", steps=(1,), seeds=(0,))
    assert "injected" in _figures(folder)["continual-probes"].caption
    (folder / "injections.parquet").unlink()
    assert "injected" not in _figures(folder)["continual-probes"].caption
