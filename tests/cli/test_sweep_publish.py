"""What a finished sweep leaves on its MLflow run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_studies import tiny_pretrain
from tiny_sweep import begin, finish, tiny_sweep

from ke_ray.cli.publish_sweep import publish_sweep
from ke_ray.cli.sweep import settings_lines
from ke_ray.engine.sweep.run import SweepOutcome, collect_sweep
from ke_ray.planning.sweep import prepare_sweep
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.tracker import Tracker
from ke_ray.training.pretrain import run_pretrain


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    """The folder of a sweep over ratio and factor, with made-up results."""
    series, output = tmp_path / "series", tmp_path / "sweep"
    run_pretrain(tiny_pretrain(series, num_steps=2, checkpoints={"steps": [0]}))
    study = tiny_sweep(
        output,
        series,
        base={"starts": {"steps": "2:2"}},
        space={"resuscitation.ratio": [0.25, 0.5], "resuscitation.factor": [0.5, 2]},
        seeds=[0, 1],
    )
    plan = prepare_sweep(study)
    begin(plan)
    for trial in plan.trials:
        keys = trial.study.resuscitation
        gain = 0.1 if keys is None else keys.ratio * keys.factor
        finish(trial, gain + trial.spec.seed / 100, forgetting=gain**2, num_steps=6)
    collect_sweep(plan, SweepOutcome(str(output)))
    return output


def test_tables_and_every_figure_are_on_the_parent(swept: Path, tmp_path: Path) -> None:
    with Tracker(TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")) as tracker:
        run = tracker.start_run("sweep", key="s", kind="sweep")
        publish_sweep(str(swept), tracker, run.run_id)
        run.finish()
        run.flush()
        client = tracker.client
        note = client.get_run(run.run_id).data.tags["mlflow.note.content"]
        assert note.startswith(f"10 trials in `{swept}`.")
        assert "| acquisition (95 %)&emsp;| forgetting (95 %)&emsp;| ok&emsp;| setting |" in note
        assert len(note.splitlines()) == 2 + 2 + 5, "a line for each setting, repeats aggregated"
        files = {file.path for file in client.list_artifacts(run.run_id)}
        assert {"trials.csv", "settings.csv", "trials.parquet", "manifest.json"} <= files
        figures = {file.path for file in client.list_artifacts(run.run_id, "figures")}
        names = ("factor-curve", "ratio-factor", "pareto", "parameters", "parallel-coordinates")
        assert figures == {
            "figures/report.html",
            *(f"figures/sweep-{name}.html" for name in names),
        }
        for path in figures:
            text = Path(client.download_artifacts(run.run_id, path)).read_text("utf-8")
            assert "http-equiv" not in text
            assert "resuscitation" in text.lower() or "forgetting" in text.lower(), path
        csv = Path(client.download_artifacts(run.run_id, "trials.csv")).read_text()
        assert len(csv.splitlines()) == 1 + 10
        assert "resuscitation.factor" in csv.splitlines()[0]


def test_the_settings_are_shown_best_first_with_their_repeats(swept: Path) -> None:
    lines = settings_lines(str(swept))
    assert lines[0].split()[0] == "acquisition"
    assert lines[-1] == "* on the Pareto front"
    first = lines[1]
    assert first.startswith("1.0050 [")
    assert "resuscitation.ratio=0.5 resuscitation.factor=2" in first
    assert len(lines) == 1 + 5 + 1


def test_without_mlflow_nothing_is_drawn(swept: Path) -> None:
    with Tracker(TrackingSettings(enabled=False)) as tracker:
        publish_sweep(str(swept), tracker, None)
