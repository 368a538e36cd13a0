"""``ke-ray checkpoints``: list the checkpoints that a SPEC names."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ke_ray.checkpoints.find.catalog import find_checkpoints
from ke_ray.checkpoints.find.series import stage_label
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.cli.options import ArchitectureFile
from ke_ray.models.architectures import use_description
from ke_ray.models.configuration import read_any_config
from ke_ray.secrets import printable, redact
from ke_ray.studies.architecture import read_architecture

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A checkpoint folder, a folder or glob of them, a Hugging Face repo (org/name, "
        "org/name:subfolder*, 'org/name#title of commits*', 'org/name-*'), a native OLMo folder "
        "or URL, or a CSV list of step and folder, URL or repo.",
    ),
]
Revisions = Annotated[
    str | None, typer.Option(help="Glob over revision (or checkpoint) names, like 'step*-tokens*'.")
]
Steps = Annotated[str | None, typer.Option(help="Step range 'a:b', both included; either open.")]
Every = Annotated[int | None, typer.Option(min=1, help="Keep every n-th.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Keep at most this many, evenly spaced.")]
StepPattern = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="Reads names that are not understood: one group gives the step, or named groups "
        "step, tokens, words, stage, branch, seed.",
    ),
]
TokensPerStep = Annotated[
    int | None,
    typer.Option(min=1, help="Batch size × sequence length: tokens where names count steps."),
]


def checkpoints(
    spec: Spec,
    revisions: Revisions = None,
    steps: Steps = None,
    every: Every = None,
    limit: Limit = None,
    step_pattern: StepPattern = None,
    tokens_per_step: TokensPerStep = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_explained: Annotated[
        bool,
        typer.Option(
            "--explain", help="Show where the first checkpoint's model keeps what is measured."
        ),
    ] = False,
    architecture: ArchitectureFile = None,
) -> None:
    """List the checkpoints that SPEC names, with step, size and duplicates."""

    listing = find_checkpoints(
        spec,
        revisions=revisions,
        steps=steps,
        every=every,
        limit=limit,
        step_pattern=step_pattern,
        tokens_per_step=tokens_per_step,
    )
    refs = listing.checkpoints
    if as_explained:
        _explain(refs[0], architecture)
        return
    if as_json:
        for note in listing.notes:
            typer.echo(f"note: {printable(note)}", err=True)
        print(json.dumps([redact(dataclasses.asdict(ref)) for ref in refs], indent=2))
        return

    optional = {
        "words": ["–" if ref.words is None else f"{ref.words / 1e6:,.0f}M" for ref in refs],
        "stage": [stage_label(ref) for ref in refs],
        "seed": [ref.seed or "–" for ref in refs],
        "series": [ref.series or "" for ref in refs],
    }
    shown = {name: cells for name, cells in optional.items() if len(set(cells)) > 1}
    table = Table("checkpoint", "step", "tokens", "size", "format", "same weights as", *shown)
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for number, ref in enumerate(refs):
        table.add_row(
            ref.name,
            "–" if ref.step is None else f"{ref.step:,}",
            "–" if ref.tokens is None else f"{ref.tokens / 1e9:,.1f}B",
            "–" if ref.size_bytes is None else f"{ref.size_bytes / 1e6:,.1f} MB",
            ref.format,
            ref.duplicate_of or "",
            *(cells[number] for cells in shown.values()),
        )
    console = Console(markup=False, emoji=False)
    console.print(table)
    duplicates = sum(ref.duplicate_of is not None for ref in refs)
    sizes = [ref.size_bytes for ref in refs if ref.size_bytes is not None]
    console.print(
        f"{len(refs)} checkpoints, "
        + (f"{sum(sizes) / 1e9:,.2f} GB" if len(sizes) == len(refs) else "sizes unknown")
        + (f", {duplicates} with the weights of another" if duplicates else "")
    )
    for note in listing.notes:
        console.print(f"note: {printable(note)}", highlight=False)


def _explain(ref: CheckpointRef, architecture: str | None) -> None:
    from ke_ray.models.explain import explain

    if architecture is not None:
        use_description(read_architecture(architecture))
    for line in [ref.label, *explain(read_any_config(ref))]:
        typer.echo(printable(line))


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(checkpoints)
