"""``ke-ray pretrain`` and ``ke-ray continual``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ke_ray.cli.options import DryRun, MlflowUri, NoMlflow, Output, Set, read_study

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ke_ray.studies.training import PretrainStudy
    from ke_ray.training.pretrain import PretrainOutcome

Study = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="The study file.")]


def pretrain(
    study: Study,
    output: Output = None,
    mlflow_uri: MlflowUri = None,
    no_mlflow: NoMlflow = False,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model from scratch and keep a series of checkpoints."""
    from ke_ray.studies.training import PretrainStudy

    loaded = read_study(
        study, PretrainStudy, given(output, mlflow_uri, no_mlflow), overrides, "ke-ray pretrain"
    )
    if dry_run:
        print(plan_text(loaded))
        print(f"steps: {loaded.num_steps:,}, tokens: {loaded.num_tokens:,}")
        print(f"checkpoints at steps: {', '.join(map(str, loaded.checkpoint_steps))}")
        return
    execute_pretrain(loaded)


def execute_pretrain(study: PretrainStudy) -> PretrainOutcome:
    """Run a pretraining study with progress on the terminal, and say what came of it."""
    from ke_ray.cli.progress import TrainingDisplay

    display = TrainingDisplay("pretrain")
    try:
        if study.num_workers == 1:
            from ke_ray.training.pretrain import run_pretrain

            outcome = run_pretrain(study, display)
        else:
            from ke_ray.engine.train import run_pretrain_on_ray

            outcome = run_pretrain_on_ray(study, display)
    finally:
        display.stop()
    if outcome.skipped:
        typer.echo(f"Pretraining is finished already and skipped: {outcome.output}")
    typer.echo(
        f"{len(outcome.checkpoint_steps)} checkpoints in {outcome.output}/checkpoints "
        f"(steps {', '.join(map(str, outcome.checkpoint_steps))}); {outcome.num_tokens:,} tokens, "
        f"loss {outcome.first_loss:.3f} → {outcome.final_loss:.3f} nats."
    )
    return outcome


def given(output: str | None, mlflow_uri: str | None, no_mlflow: bool) -> dict[str, Any]:
    """The options that all training commands have, by dotted study key."""
    return {
        "output": output,
        "mlflow.uri": mlflow_uri,
        "mlflow.enabled": False if no_mlflow else None,
    }


def plan_text(study: BaseModel) -> str:
    """A resolved study as YAML."""
    return yaml.safe_dump(json.loads(study.model_dump_json(exclude_none=True)), sort_keys=False)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(pretrain)
