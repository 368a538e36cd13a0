"""``ke-ray studies``, ``init`` and ``schema``: shipped studies, and what a study may say."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ke_ray.errors import ConfigError, nearest
from ke_ray.shipped import MODELINE, list_shipped, study_path


def studies() -> None:
    """List the studies that ship with ke_ray; their names stand for their files."""
    from ke_ray.planning.listed_cost import listed_cost

    rows = [("study", "kind", "to fetch", "H100-hours", "what it does")]
    for study in list_shipped():
        size, hours = listed_cost(study)
        each = " each" if study.kind == "scan" else ""
        costs = (_bytes(size, each), "–" if hours is None else f"{hours:.2g}{each}")
        rows.append((study.name, study.kind, *costs, study.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        cells = [
            cell.rjust(w) if cell in row[2:4] else cell.ljust(w)
            for cell, w in zip(row, widths, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        typer.echo(line if not columns or len(line) <= columns else f"{line[: columns - 1]}…")
    typer.echo(
        "\nEstimates, by the sizes in the models' names; of scans for each checkpoint. ke-ray KIND "
        "STUDY --dry-run says\nwhat it would fetch and how long that would take; ke-ray init STUDY "
        "writes a copy to change."
    )


def _bytes(number: float | None, each: str) -> str:
    if number is None:
        return "–"
    if number < 1e9:
        return f"{number / 1e6:,.0f} MB{each}" if number else "0"
    return f"{number / 1e9:,.0f} GB{each}"


def init(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A name that `studies` lists.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Default: STUDY.yaml in this folder.")
    ] = None,
) -> None:
    """Write a commented copy of a shipped study, to be changed."""
    source = Path(study_path(study))
    target = Path(output or source.name)
    text = source.read_text(encoding="utf-8")
    schema = re.compile(rf"(?<=# {re.escape(MODELINE)})\S+")  # relative to the shipped file
    text = schema.sub(lambda name: str((source.parent / name[0]).resolve()), text, count=1)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"'{target}' exists already; give another file with --output, or remove it."
        ) from error
    except OSError as error:
        raise ConfigError(f"'{target}' cannot be written: {error.strerror}.") from error
    typer.echo(f"{target}")


def schema(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="scan, pretrain, continual, sweep or job.")
    ],
) -> None:
    """Print the JSON Schema of a kind of study: all keys, their types, bounds and meaning."""
    from ke_ray.studies.schema import KINDS, schema_text

    if kind not in KINDS:
        raise ConfigError(
            f"'{kind:.100}' is no kind of study; give one of {', '.join(KINDS)}."
            f"{nearest(kind, KINDS)}"
        )
    typer.echo(schema_text(kind), nl=False)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(studies)
    app.command()(init)
    app.command()(schema)
