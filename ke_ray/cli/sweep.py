"""``ke-ray sweep``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from ke_ray import storage
from ke_ray.cli.options import DryRun, MlflowUri, NoMlflow, Output, Set
from ke_ray.cli.train import Study

if TYPE_CHECKING:
    from ke_ray.engine.sweep.run import SweepOutcome
    from ke_ray.studies.sweep import SweepStudy

__all__ = ["SweepDisplay", "execute_sweep", "settings_lines", "sweep"]

_MAX_LINES = 40


class SweepDisplay:
    """One line whenever a trial ends: counts, and the time left once one is known."""

    def __init__(self) -> None:
        self._counts = {"ok": 0, "failed": 0, "stopped": 0}
        self._total = self._concurrency = 0
        self._began: dict[str, float] = {}
        self._took_s: list[float] = []

    def start(self, *, num_trials: int, num_skipped: int, concurrency: int) -> None:
        """See ``ke_ray.engine.sweep.run.SweepProgress``."""
        self._total, self._concurrency = num_trials, concurrency
        if num_skipped:
            print(f"{num_skipped} trials are finished already and skipped.", file=sys.stderr)
        print(f"sweep: {num_trials} trials, {concurrency} at a time", file=sys.stderr, flush=True)

    def begun(self, trial_id: str) -> None:
        """See ``ke_ray.engine.sweep.run.SweepProgress``."""
        self._began[trial_id] = time.monotonic()

    def ended(self, trial_id: str, row: Mapping[str, Any]) -> None:
        """See ``ke_ray.engine.sweep.run.SweepProgress``."""
        self._counts[row["status"]] += 1
        began = self._began.pop(trial_id, None)
        if began is not None:
            self._took_s.append(time.monotonic() - began)
        print(self._text(trial_id, row), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """See ``ke_ray.engine.sweep.run.SweepProgress``."""

    def _text(self, trial_id: str, row: Mapping[str, Any]) -> str:
        done = sum(self._counts.values())
        left = self._total - done
        text = f"sweep: {done}/{self._total} ended, {self._counts['failed']} failed"
        if self._counts["stopped"]:
            text += f", {self._counts['stopped']} stopped early"
        if left and self._took_s:
            from ke_ray.cli.progress import duration

            mean_s = sum(self._took_s) / len(self._took_s)
            text += f", about {duration(mean_s * left / max(1, self._concurrency))} left"
        return f"{text}; {trial_id}: {_result(row)}"


def _result(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    parts = [
        f"{name} {100 * row[column]:+.1f} %"
        for name, column in (("A", "acquisition"), ("F", "forgetting"))
        if row.get(column) is not None
    ]
    return ", ".join(parts) or "ok"


def sweep(
    study: Study,
    output: Output = None,
    mlflow_uri: MlflowUri = None,
    no_mlflow: NoMlflow = False,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Vary a continual-learning study (grid, random or Optuna), and compare what comes of it."""
    from ke_ray.studies.sweep import load_sweep

    options = [f"output={output}"] if output else []
    options += [f"mlflow.uri={mlflow_uri}"] if mlflow_uri else []
    options += ["mlflow.enabled=false"] if no_mlflow else []
    loaded = load_sweep(study, [*options, *(overrides or [])])
    if dry_run:
        from ke_ray.planning.sweep_forecast import forecast

        print(forecast(loaded))
        return
    outcome = execute_sweep(loaded)
    raise typer.Exit(outcome.exit_code)


def execute_sweep(study: SweepStudy) -> SweepOutcome:
    """Run a sweep with progress on the terminal; publish and print what came of it."""
    from ke_ray.cli.publish_sweep import publish_sweep
    from ke_ray.engine.sweep.run import run_sweep
    from ke_ray.planning.sweep import prepare_sweep
    from ke_ray.storage.ownership import claimed
    from ke_ray.tracking.tracker import Tracker

    with claimed(study.output, "sweep"):
        plan = prepare_sweep(study)
        with Tracker(study.mlflow) as tracker:
            outcome = run_sweep(plan, tracker, SweepDisplay())
            if outcome.rows:
                publish_sweep(study.output, tracker, outcome.mlflow_run_id)
    for line in settings_lines(study.output):
        typer.echo(line)
    for name, error in outcome.failures:
        typer.echo(f"failed: {name}: {error}", err=True)
    for metric in outcome.missing:
        typer.echo(f"objective '{metric}': no trial reported it", err=True)
    ok = sum(row["status"] == "ok" for row in outcome.rows)
    stopped = sum(row["status"] == "stopped" for row in outcome.rows)
    typer.echo(
        f"{ok} trials ok ({outcome.skipped} finished before), "
        + (f"{stopped} stopped early, " if stopped else "")
        + f"{len(outcome.failures)} failed. Results: {study.output}"
    )
    return outcome


def settings_lines(folder: str) -> list[str]:
    """The settings of a sweep as a table for the terminal (``settings_cells``)."""
    from ke_ray.cli.publish_sweep import settings_cells

    table = settings_cells(folder)
    if table is None:
        return []
    head, *rows = table
    lines = ["  ".join([f"{cell:<34}" for cell in head[:-2]] + head[-2:])]
    for *values, num_ok, text in rows[:_MAX_LINES]:
        lines.append("  ".join([*(f"{cell:<34}" for cell in values), f"{num_ok:>2}", text]))
    if len(rows) > _MAX_LINES:
        path = storage.join(folder, "settings.parquet")
        lines.append(f"… and {len(rows) - _MAX_LINES} more in {path}")
    lines.append("* on the Pareto front" if len(head) > 3 else "* the best")
    return lines


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(sweep)
