"""``ke-ray sweep``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ke_ray import storage
from ke_ray.cli.next_steps import after_results, print_next
from ke_ray.cli.options import DryRun, MlflowUri, NoMlflow, Output, Set
from ke_ray.cli.progress import command_display, print_outcome
from ke_ray.cli.publish_sweep import publish_sweep, settings_cells
from ke_ray.cli.train import Study
from ke_ray.shipped import study_path
from ke_ray.storage.ownership import claimed

if TYPE_CHECKING:
    from ke_ray.outcomes import SweepOutcome
    from ke_ray.studies.sweep import SweepStudy

_MAX_LINES = 40


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
    loaded = load_sweep(study_path(study), [*options, *(overrides or [])])
    if dry_run:
        from ke_ray.planning.sweep_forecast import forecast
        from ke_ray.planning.sweep_memory import sweep_memory_text

        print(forecast(loaded))
        print(sweep_memory_text(loaded))
        return
    outcome = execute_sweep(loaded)
    print_next(after_results(loaded.output, failed=bool(outcome.failures)))
    raise typer.Exit(outcome.exit_code)


def execute_sweep(study: SweepStudy) -> SweepOutcome:
    """Run a sweep with progress on the terminal; publish and print what came of it."""
    from ke_ray.engine.sweep.run import run_sweep
    from ke_ray.planning.sweep import prepare_sweep
    from ke_ray.planning.sweep_memory import check_sweep_memory
    from ke_ray.tracking.tracker import open_tracker

    with (
        claimed(study.output, "sweep"),
        command_display("sweep", "trials", study.output) as display,
    ):
        check_sweep_memory(study)
        plan = prepare_sweep(study)
        with open_tracker(study.mlflow) as tracker:
            outcome = run_sweep(plan, tracker, display)
            if outcome.rows:
                publish_sweep(study.output, tracker, outcome.mlflow_run_id)
    for line in settings_lines(study.output):
        typer.echo(line)
    for metric in outcome.missing:
        typer.echo(f"objective '{metric}': no trial reported it", err=True)
    stopped = sum(row["status"] == "stopped" for row in outcome.rows)
    remark = f" ({stopped} of all stopped early)" if stopped else ""
    print_outcome(outcome, f"{outcome.num_done} trials done{remark}")
    return outcome


def settings_lines(folder: str) -> list[str]:
    """The settings of a sweep as a table for the terminal (``settings_cells``)."""
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
