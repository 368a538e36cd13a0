"""``ke-ray pretrain`` and ``ke-ray continual``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ke_ray import storage
from ke_ray.api.publish import publish_report
from ke_ray.cli.next_steps import after_pretrain, after_results, print_next
from ke_ray.cli.options import (
    ArchitectureFile,
    DryRun,
    MlflowUri,
    NoMlflow,
    Output,
    Resuscitate,
    Set,
    parse_resuscitate,
    read_study,
)
from ke_ray.cli.progress import command_display, print_outcome
from ke_ray.cli.scan import print_results
from ke_ray.planning.memory_forecast import check_memory, memory_text
from ke_ray.secrets import redact
from ke_ray.storage.ownership import claimed
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.training import PretrainStudy

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ke_ray.outcomes import Outcome, PretrainOutcome
    from ke_ray.training.loop import Progress

Study = Annotated[
    str, typer.Argument(metavar="STUDY", help="Its file, or its name in `ke-ray studies`.")
]


def pretrain(
    study: Study,
    output: Output = None,
    mlflow_uri: MlflowUri = None,
    no_mlflow: NoMlflow = False,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model from scratch and keep a series of checkpoints."""

    loaded = read_study(
        study, PretrainStudy, given(output, mlflow_uri, no_mlflow), overrides, "ke-ray pretrain"
    )
    if dry_run:
        print(plan_text(loaded))
        print(f"steps: {loaded.num_steps:,}, tokens: {loaded.num_tokens:,}")
        print(f"checkpoints at steps: {', '.join(map(str, loaded.checkpoint_steps))}")
        print(memory_text(loaded))
        return
    execute_pretrain(loaded)
    print_next(after_pretrain(loaded))


def execute_pretrain(study: PretrainStudy) -> PretrainOutcome:
    """Run a pretraining study with progress on the terminal, and say what came of it."""
    from ke_ray.results.manifest import truthful_ending

    with (
        claimed(study.output, "pretrain"),
        truthful_ending(study.output),
        command_display("pretrain", "runs", study.output) as display,
    ):
        check_memory(study)

        def show(progress: Progress) -> None:
            display.tokens(progress.record.num_tokens, study.num_tokens, str(progress))

        display.start(num_items=1, num_skipped=0)
        if study.num_workers == 1:
            from ke_ray.training.pretrain import run_pretrain

            outcome = run_pretrain(study, show)
        else:
            from ke_ray.engine.train.trainer import run_pretrain_on_ray

            outcome = run_pretrain_on_ray(study, show)
    if outcome.num_skipped:
        typer.echo(f"Pretraining is finished already and skipped: {outcome.output}")
    typer.echo(
        f"{len(outcome.checkpoint_steps)} checkpoints in {outcome.output}/checkpoints "
        f"(steps {', '.join(map(str, outcome.checkpoint_steps))}); {outcome.num_tokens:,} tokens, "
        f"loss {outcome.first_loss:.3f} → {outcome.final_loss:.3f} nats."
    )
    return outcome


def continual(
    study: Study,
    output: Output = None,
    resuscitate: Resuscitate = None,
    architecture: ArchitectureFile = None,
    mlflow_uri: MlflowUri = None,
    no_mlflow: NoMlflow = False,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Train on from checkpoints while facts are injected; measure acquisition and forgetting."""

    options = given(output, mlflow_uri, no_mlflow) | {"architecture": architecture}
    if resuscitate is not None:
        options["resuscitation"] = parse_resuscitate(resuscitate)
    loaded = read_study(study, ContinualStudy, options, overrides, "ke-ray continual")
    if dry_run:
        from ke_ray.planning.training_forecast import forecast

        print(forecast(loaded))
        print(memory_text(loaded))
        return
    outcome = execute_continual(loaded)
    print_next(after_results(loaded.output, failed=bool(outcome.failures)))
    raise typer.Exit(outcome.exit_code)


def execute_continual(study: ContinualStudy) -> Outcome:
    """Run a continual-learning study with progress on the terminal, and print its table."""
    from ke_ray.engine.train.continual import run_continual_study
    from ke_ray.results.manifest import truthful_ending

    with claimed(study.output, "continual"), truthful_ending(study.output):
        check_memory(study)
        with command_display("continual", "runs", study.output) as display:
            outcome = run_continual_study(study, display)
        # The command may have been killed between its last run and its report.
        is_new = len(outcome.rows) > outcome.num_skipped
        if is_new or not storage.exists(storage.join(study.output, "report.html")):
            ids = [row.get("mlflow_run_id") for row in outcome.rows]
            publish_report(study.output, study.mlflow, ids)
    print_results(study.output)
    print_outcome(outcome, f"{outcome.num_done} runs done")
    return outcome


def given(output: str | None, mlflow_uri: str | None, no_mlflow: bool) -> dict[str, Any]:
    """The options that all training commands have, by dotted study key."""
    return {
        "output": output,
        "mlflow.uri": mlflow_uri,
        "mlflow.enabled": False if no_mlflow else None,
    }


def plan_text(study: BaseModel) -> str:
    """A resolved study as YAML, without secrets."""
    values = json.loads(study.model_dump_json(exclude_none=True))
    return yaml.safe_dump(redact(values), sort_keys=False)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(pretrain)
    app.command()(continual)
