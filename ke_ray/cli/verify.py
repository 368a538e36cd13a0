"""``ke-ray verify``: the cheapest gates of a study that repeats the paper, before it is run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ke_ray.cli.options import Set
from ke_ray.cli.train import Study
from ke_ray.config import load_study, read_yaml
from ke_ray.errors import ConfigError
from ke_ray.shipped import study_path
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.runs import list_runs

#: Points that P may differ from the paper's: the prompts are others (assumed, not measured).
_TOLERANCE_POINTS = 3.0


def verify(
    study: Study,
    overrides: Set = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many items of each task.")
    ] = None,
) -> None:
    """Check a continual study or a sweep before a GPU-hour is spent: data, starts, their K and P.

    Each gate is dearer than the one before, and the first that does not hold ends the command. K
    and P of the untrained starts are laid beside those that Tables 1 and 2 of the paper imply; K
    has another unit there and is not compared.
    """
    from ke_ray.training.starts import find_sources, measure_starts

    loaded = _continual(study_path(study), overrides or [])
    for source, num_files in find_sources(loaded).items():
        typer.echo(f"{source}: {num_files} file{'s' * (num_files != 1)}")
    starts = {spec.ref.name: spec.ref for spec in list_runs(loaded)}
    typer.echo(f"starts: {', '.join(starts)}")
    table = Table("start", "", "here", "the paper's, implied", "", box=None, pad_edge=False)
    failed = False
    for spec, snapshot in measure_starts(loaded, limit):
        cells, holds = _judged(loaded.starts.spec, spec.ref.step, snapshot, sampled=bool(limit))
        failed = failed or not holds
        for row in cells:
            table.add_row(spec.ref.name, *row)
    Console().print(table)
    if failed:
        typer.echo("A start is not the paper's: see its P before anything is trained.", err=True)
    raise typer.Exit(1 if failed else 0)


def _continual(path: str, overrides: list[str]) -> ContinualStudy:
    from ke_ray.studies.sweep import load_sweep

    kind = read_yaml(path, "a study file").get("kind")
    if kind == "sweep":
        from ke_ray.studies.sweep import load_sweep

        return load_sweep(path, overrides).base
    if kind == "continual":
        return load_study(path, ContinualStudy, overrides)
    raise ConfigError(f"{path} has kind {kind!r}; verify takes a continual study or a sweep.")


def _judged(
    spec: str, step: int | None, snapshot: Any, *, sampled: bool
) -> tuple[list[tuple[str, str, str, str]], bool]:
    """(a row each for K and P, whether the start may be the paper's)."""
    from ke_ray.report import paper

    stage = paper.nearest_stage(step) if step is not None and paper.is_olmo_1b(spec) else None
    rows, holds = [], True
    if snapshot.knowledge is not None:
        implied = "–" if stage is None else f"{paper.before('probe_logprob_after')[stage]:.3f}"
        remark = "" if stage is None else "not compared"
        rows.append(("K, nats per token", f"{snapshot.knowledge:.3f}", implied, remark))
    if snapshot.accuracy is not None:
        implied, remark, here = "–", "", 100 * snapshot.accuracy
        if stage is not None:
            published = paper.before("downstream_after")[stage]
            implied = f"{published:.1f}"
            near = abs(here - published) <= _TOLERANCE_POINTS
            holds = near or sampled
            remark = "a sample: not judged" if sampled else f"within {_TOLERANCE_POINTS:g}: "
            remark += "" if sampled else ("yes" if near else "no")
        rows.append(("P, %", f"{here:.1f}", implied, remark))
    return rows, holds


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(verify)
