"""``ke-ray relate``: planted relations are found, trends are taken out, wrong requests refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from ke_ray.errors import ResultsError
from ke_ray.report.charts.relation import relation_figures
from ke_ray.report.relation import relate
from ke_ray.report.sources import find_results
from ke_ray.results.columns import to_table

STEPS = [0, 10, 20, 40, 80, 160, 320, 640]
SEEDS = ("1", "2")  # of pretraining: two series


def quantities(seed: str) -> dict[str, np.ndarray]:
    """Of every start: loss falls with training, `gini` moves A, entropy only trends as A does."""
    rng = np.random.default_rng(int(seed))
    trend = np.log1p(STEPS)
    loss = 5 - 0.4 * trend + 0.05 * rng.normal(size=len(STEPS))
    gini = 0.3 + 0.02 * rng.normal(size=len(STEPS)) + 10 * int(seed)
    return {
        "loss": loss,
        "gini": gini,
        "knowledge_entropy": 8 - 0.5 * trend + 0.1 * rng.normal(size=len(STEPS)),
        "acquisition": 0.5 - 0.05 * trend + 2 * (gini - gini.mean()),
    }


def write_scan(folder: Path, **manifest: object) -> Path:
    rows = [
        {
            "checkpoint": f"seed{seed}-step{step}",
            "step": step,
            "seed": seed,
            "series": "tiny",
            "corpus": "wiki",
            "measure": measure,
            "value": float(quantities(seed)[measure][number]),
            "weights_sha256": f"{seed}-{step}",
            "data_sha256": "data",
            "status": "ok",
        }
        for seed in SEEDS
        for number, step in enumerate(STEPS)
        for measure in ("loss", "gini", "knowledge_entropy")
    ]
    return _write(folder, "scan", "entropy", rows, **manifest)


def write_study(
    folder: Path, steps: list[int] = STEPS, level: float = 0.0, **manifest: object
) -> Path:
    rows = [
        {
            "run": f"{seed}-{step}-{repeat}",
            "checkpoint": f"seed{seed}-step{step}",
            "step": step,
            "pretraining_seed": seed,
            "seed": repeat,
            "acquisition": float(quantities(seed)["acquisition"][STEPS.index(step)])
            + sign * 0.01
            + level,
            "probe_logprob_before": -4.0,
            "probe_logprob_after": -4.0 + 0.001 * step,
            "status": "ok",
        }
        for seed in SEEDS
        for step in steps
        for repeat, sign in enumerate((-1, 1))
    ]
    rows.append(
        {**rows[-1], "run": "resuscitated", "resuscitation_ratio": 0.5, "acquisition": 99.0}
    )
    return _write(folder, "continual", "runs", rows, **manifest)


def _write(folder: Path, kind: str, table: str, rows: list[dict], **manifest: object) -> Path:
    folder.mkdir(parents=True)
    content = {"kind": kind, "schema_version": 1, "status": "finished", **manifest}
    (folder / "manifest.json").write_text(json.dumps(content))
    parquet.write_table(to_table(table, rows), folder / f"{table}.parquet")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_scan(tmp_path / "scan"), write_study(tmp_path / "study")


def related(*folders: Path, **keys: str):
    (scan,), studies = find_results([folders[0]]), find_results(folders[1:])
    table = relate(scan, studies, **keys)
    return table.set_index(["measure", "outcome", "kind", "fixed"]).sort_index()


def test_a_common_trend_goes_when_the_step_is_held_fixed_and_a_real_relation_stays(folders):
    table = related(*folders)
    entropy = table.loc[("knowledge_entropy", "acquisition", "pearson")]
    gini = table.loc[("gini", "acquisition", "pearson")]
    assert entropy.loc["", "r"] > 0.8
    assert abs(entropy.loc["step, loss", "r"]) < 0.5
    assert gini.loc["step, loss", "r"] > 0.999, "planted: A = trend + 2 gini, per series"
    assert gini.loc["step, loss", ["num_starts", "num_series"]].to_list() == [16, 2]
    assert gini.loc["step, loss", "p_holm"] < 1e-6 < entropy.loc["step, loss", "p_holm"]


def test_every_value_is_that_of_a_loop_from_the_equations(folders):
    row = related(*folders).loc[("knowledge_entropy", "acquisition", "pearson", "step, loss")]
    numbers = [quantities(seed) for seed in SEEDS]
    x, y, loss = (
        np.concatenate([own[name] for own in numbers])
        for name in ("knowledge_entropy", "acquisition", "loss")
    )
    z = np.column_stack(
        [np.repeat([1.0, 0.0], 8), np.repeat([0.0, 1.0], 8), np.tile(np.log1p(STEPS), 2), loss]
    )
    rest = [v - z @ np.linalg.lstsq(z, v, rcond=None)[0] for v in (x, y)]
    r = float(np.corrcoef(*rest)[0, 1])
    assert row["r"] == pytest.approx(r)
    from scipy import stats

    t = r * np.sqrt((16 - 4 - 1) / (1 - r**2))
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(t), 16 - 4 - 1))


def test_a_measure_that_is_held_fixed_and_an_outcome_that_is_absent_have_no_value(folders):
    table = related(*folders)
    assert np.isnan(table.loc[("loss", "acquisition", "pearson", "step, loss"), "r"])
    assert np.isfinite(table.loc[("loss", "acquisition", "pearson", ""), "r"])
    assert table.xs("forgetting", level="outcome")["r"].isna().all()
    assert table.loc[("loss", "knowledge_change", "spearman", ""), "r"] < -0.9


def test_the_interval_is_fishers_with_the_degrees_of_the_p_value(folders):
    table = related(*folders)
    row = table.loc[("knowledge_entropy", "acquisition", "pearson", "step, loss")]
    half = 1.959964 / np.sqrt(16 - 4 - 1 - 1)
    ends = np.tanh(np.arctanh(row["r"]) + np.array([-half, half]))
    assert row[["low", "high"]].to_list() == pytest.approx(ends)


def test_several_studies_of_the_same_starts_are_no_further_points(folders, tmp_path):
    other_level = write_study(tmp_path / "again", STEPS[2:], level=0.3)
    table, once = related(*folders, other_level), related(*folders)
    counts = table.loc[("gini", "acquisition", "pearson", ""), ["num_starts", "num_series"]]
    assert counts.to_list() == [16, 2]
    for column in ("r", "low", "high", "p"):
        own, expected = (
            frame.xs("acquisition", level="outcome")[column] for frame in (table, once)
        )
        assert own.to_numpy() == pytest.approx(expected.to_numpy(), nan_ok=True), column


def test_studies_without_a_start_in_common_are_series_of_their_own(folders, tmp_path):
    early = write_study(tmp_path / "early", STEPS[:4])
    late = write_study(tmp_path / "late", STEPS[4:], level=0.3)
    row = related(folders[0], early, late).loc[("gini", "acquisition", "pearson", "")]
    assert (row["num_starts"], row["num_series"]) == (16, 4)


def test_a_study_from_checkpoints_of_another_spec_is_not_joined_by_name(tmp_path):
    def manifest(key: str, spec: str) -> dict[str, object]:
        return {"config": {key: {"spec": spec}}}

    scan = write_scan(tmp_path / "scan", **manifest("checkpoints", "org/model-70m"))
    other = write_study(tmp_path / "other", **manifest("starts", "org/model-160m"))
    with pytest.raises(ResultsError, match=r"'org/model-70m'.*'org/model-160m'"):
        related(scan, other)
    assert not relation_figures(find_results([scan, other]))
    same = write_study(tmp_path / "same", **manifest("starts", "hf://org/model-70m@step*"))
    assert len(related(scan, same))
    (figure,) = relation_figures(find_results([scan, other, same]))
    assert "16 starts of 2 series" in figure.caption


@pytest.mark.parametrize("end", ["", "step*", "step10"])
def test_the_starts_may_be_a_part_of_the_scan_by_another_path(tmp_path, end):
    here = tmp_path / "series"
    listed = [{"name": f"step{n}", "location": str(here / f"step{n}")} for n in STEPS]
    scan = write_scan(
        tmp_path / "scan", config={"checkpoints": {"spec": str(here)}}, checkpoints=listed
    )
    spec = f"{tmp_path}/scan/../series/{end}"
    assert len(related(scan, write_study(tmp_path / "study", config={"starts": {"spec": spec}})))


def test_what_cannot_be_related_is_refused_with_the_remedy(folders, tmp_path):
    scan, study = folders
    with pytest.raises(ResultsError, match=r"kind 'continual', expected 'scan'"):
        related(study, study)
    with pytest.raises(ResultsError, match=r"no corpus 'c4'; it has: wiki"):
        related(scan, study, corpus="c4")
    with pytest.raises(ResultsError, match=r"2 starts in common.*at least 4"):
        related(scan, write_study(tmp_path / "short", STEPS[:1]))
    revived = write_scan(tmp_path / "revived", identity={"resuscitation": {"ratio": 0.5}})
    with pytest.raises(ResultsError, match="resuscitated"):
        related(revived, study)
    table = parquet.read_table(scan / "entropy.parquet").to_pandas()
    table.loc[table["step"] == 640, "data_sha256"] = "other"
    table.to_parquet(scan / "entropy.parquet")
    with pytest.raises(ResultsError, match="2 data hashes"):
        related(scan, study)


def test_the_command_prints_and_writes_what_the_function_gives(folders, tmp_path):
    command = [sys.executable, "-m", "ke_ray", "relate", *map(str, folders)]
    output = ["--output", str(tmp_path / "relation.parquet")]
    result = subprocess.run([*command, *output], capture_output=True, text=True, check=False)
    assert (result.returncode, "step, loss fixed" in result.stdout) == (0, True), result.stderr
    written = parquet.read_table(tmp_path / "relation.parquet").to_pandas()
    own = related(*folders).reset_index()
    merged = written.merge(own, on=["measure", "outcome", "kind", "fixed"])
    assert len(merged) == len(own) == 3 * 4 * 2 * 2
    assert merged["r_x"].to_numpy() == pytest.approx(merged["r_y"].to_numpy(), nan_ok=True)


def test_the_report_has_one_figure_of_all_measures(folders):
    (figure,) = relation_figures(find_results(folders))
    assert [panel.key for panel in figure.panels] == [("Pearson",), ("Spearman",)]
    rows = figure.panels[0].view.rows
    assert set(rows["measure"]) == {"loss", "gini", "knowledge_entropy"}
    assert list(dict.fromkeys(rows["short"])) == ["A", "A*", "ΔK", "ΔK*"]
    assert "step, loss fixed" in figure.caption
    figure.panels[0].view.spec()


def test_values_of_weights_are_related_like_measures(folders):
    """The FFN's stable rank moves A as `gini` does; rows of two matrices are averaged."""
    scan, study = folders
    rows = [
        {
            "checkpoint": f"seed{seed}-step{step}",
            "layer": 0,
            "part": part,
            "matrix": f"{part}.{matrix}",
            "stable_rank": float(quantities(seed)["gini"][number]) + sign
            if part == "ffn"
            else float(step),
            "status": "ok",
        }
        for seed in SEEDS
        for number, step in enumerate(STEPS)
        for part in ("ffn", "attention")
        for matrix, sign in enumerate((-1, 1))
    ]
    parquet.write_table(to_table("weights", rows), scan / "weights.parquet")
    table = related(scan, study)
    gini, rank = (
        table.loc[(name, "acquisition", "pearson", "step, loss")]
        for name in ("gini", "ffn_stable_rank")
    )
    assert rank["r"] == pytest.approx(gini["r"], abs=1e-6)
    assert {name for name, *_ in table.index} == {
        *("loss", "gini", "knowledge_entropy"),
        *("ffn_stable_rank", "attention_stable_rank"),
    }
    (found,), studies = find_results([scan]), find_results([study])
    (figure,) = relation_figures([found, *studies])
    assert "Stable rank, FFN matrices" in set(figure.panels[0].view.rows["title"])
