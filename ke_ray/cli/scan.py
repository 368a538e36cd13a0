"""``ke-ray scan`` and ``ke-ray results``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ke_ray.cli.checkpoints import (
    Every,
    Limit,
    Revisions,
    StepPattern,
    Steps,
    TokensPerStep,
)
from ke_ray.cli.next_steps import after_results, print_next
from ke_ray.cli.options import (
    ArchitectureFile,
    CacheBytes,
    CacheDir,
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
from ke_ray.errors import ConfigError
from ke_ray.shipped import find_study
from ke_ray.storage.ownership import claimed

if TYPE_CHECKING:
    from ke_ray.outcomes import ScanOutcome
    from ke_ray.studies.scan import ScanStudy


def scan(
    checkpoints: Annotated[
        str,
        typer.Argument(metavar="SPEC|STUDY", help="Checkpoints, or a study (file or name)."),
    ],
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A corpus; repeatable.")
    ] = None,
    num_instances: Annotated[int | None, typer.Option(min=1, help="N, instances.")] = None,
    precision: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Stop at this error, as share of the largest change."),
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="T, tokens each.")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="Instances: spread over the data (default), or first.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, folder or repo.")] = None,
    eos_token_id: Annotated[int | None, typer.Option(help="Default: the model config's.")] = None,
    measures: Annotated[
        str | None, typer.Option(help="Comma-separated; default: see docs/measures.md.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE.py:NAME", help="Also a measure of your own; repeatable."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="No effect on results.")] = None,
    num_actors: Annotated[
        int | None, typer.Option(min=1, help="Default: GPUs, else cores.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda (never CPUs) or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    revisions: Revisions = None,
    steps: Steps = None,
    every: Every = None,
    limit: Limit = None,
    step_pattern: StepPattern = None,
    tokens_per_step: TokensPerStep = None,
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
    resuscitate: Resuscitate = None,
    architecture: ArchitectureFile = None,
    output: Output = None,
    mlflow_uri: MlflowUri = None,
    no_mlflow: NoMlflow = False,
    overrides: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Score knowledge entropy and its kin for every checkpoint of SPEC."""
    from ke_ray.studies.scan import ScanStudy

    file = find_study(checkpoints)
    given: dict[str, Any] = {
        "checkpoints.spec": None if file else checkpoints,
        "checkpoints.revisions": revisions,
        "checkpoints.steps": steps,
        "checkpoints.every": every,
        "checkpoints.limit": limit,
        "checkpoints.step_pattern": step_pattern,
        "checkpoints.tokens_per_step": tokens_per_step,
        "data": _corpora(data) if data else None,
        "num_instances": num_instances,
        "precision": precision,
        "sequence_length": sequence_length,
        "sampling": sampling,
        "tokenizer": tokenizer,
        "eos_token_id": eos_token_id,
        "measures": tuple(m.strip() for m in measures.split(",")) if measures else None,
        "own_measures": tuple(measure) if measure else None,
        "batch_size": batch_size,
        "num_actors": num_actors,
        "device": device,
        "dtype": dtype,
        "cache_dir": cache_dir,
        "cache_bytes": cache_bytes,
        "resuscitation": parse_resuscitate(resuscitate) if resuscitate is not None else None,
        "architecture": architecture,
        "output": output,
        "mlflow.uri": mlflow_uri,
        "mlflow.enabled": False if no_mlflow else None,
    }
    study = read_study(file, ScanStudy, given, overrides, "ke-ray scan")
    if dry_run:
        from ke_ray.planning.scan_forecast import forecast

        print(forecast(study))
        return
    outcome = execute_scan(study)
    print_next(after_results(study.output, failed=bool(outcome.failures)))
    raise typer.Exit(outcome.exit_code)


def _corpora(options: list[str]) -> dict[str, str]:
    from ke_ray.data.corpus import parse_data_option

    corpora: dict[str, str] = {}
    for name, source in map(parse_data_option, options):
        if name in corpora:
            raise ConfigError(
                f"--data names '{name}' twice, for '{corpora[name]}' and '{source}'; give each "
                "corpus a name of its own: NAME=SOURCE."
            )
        corpora[name] = source
    return corpora


def execute_scan(study: ScanStudy) -> ScanOutcome:
    """Run a scan study with progress on the terminal, and print its table."""
    from ke_ray.api.scan import run_scan_study

    with (
        claimed(study.output, "scan"),
        command_display("scan", "checkpoints", study.output) as display,
    ):
        outcome = run_scan_study(study, display)
    print_results(study.output)
    print_outcome(outcome, f"{outcome.num_done} scanned")
    return outcome


def results(
    paths: Annotated[list[str], typer.Argument(metavar="DIR…", help="Result folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    merge: Annotated[
        str | None, typer.Option(metavar="OUT", help="Join compatible scans into OUT.")
    ] = None,
) -> None:
    """Print result folders, or join scans of one series."""
    if merge is not None:
        from ke_ray.results import merge_scans

        merge_scans(paths, merge)
        paths = [merge]
    from ke_ray.report.terminal import headline_rows, rows_as_csv, rows_as_json

    if as_json:
        print(rows_as_json(headline_rows(paths)))
    elif as_csv:
        print(rows_as_csv(headline_rows(paths)), end="")
    else:
        for path in paths:
            print_results(path)


def print_results(path: str | Path) -> None:
    """The headline table of a result folder, and what resuscitation made of a scan's entropy."""
    from ke_ray.report.terminal import print_results as show
    from ke_ray.resuscitation.prediction import prediction_lines, read_predictions

    for result in show([str(path)]):
        for line in prediction_lines(read_predictions(result.path)):
            typer.echo(line)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(scan)
    app.command()(results)
