"""``ke-ray compare``: how alike checkpoints, or corpora, use the memories."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ke_ray import storage
from ke_ray.cli.options import RowsOutput, check_rows_output
from ke_ray.errors import ConfigError
from ke_ray.secrets import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow


def compare(
    scans: Annotated[
        list[str],
        typer.Argument(metavar="SCAN [SCAN]", help="One scan folder, or two of one series."),
    ],
    output: RowsOutput = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print every row, by layer, as CSV.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=2, help="At most this many checkpoints, evenly spaced.")
    ] = None,
) -> None:
    """Compare the coefficients of every two checkpoints of a scan, or of two scans by name."""
    from ke_ray.results import comparison

    if len(scans) > 2:
        raise ConfigError(f"{len(scans)} scan folders were given; expected one or two.")
    if as_csv and output is not None:
        raise ConfigError("--csv and --output were both given; expected one of them.")
    check_rows_output(output)
    tables = comparison.compare(scans, limit)
    if as_csv:
        _print_csv(tables)
        return
    totals: list[pyarrow.Table] = []
    noted = _note_totals(tables, totals)
    if output is None:
        for _ in noted:
            pass
    else:
        storage.write_tables(output, comparison.SCHEMA, noted)
    _print_table(totals)
    if output is not None:
        typer.echo(f"Every pair, by layer: {output}")


def _note_totals(
    tables: Iterator[pyarrow.Table], totals: list[pyarrow.Table]
) -> Iterator[pyarrow.Table]:
    """The same tables; their rows of all layers are also kept."""
    import pyarrow.compute as pc

    for table in tables:
        own = table.filter(pc.field("layer").is_null())
        if own.num_rows:
            totals.append(own)
        yield table


def _print_csv(tables: Iterator[pyarrow.Table]) -> None:
    from pyarrow import csv

    from ke_ray.results.comparison import SCHEMA

    sys.stdout.flush()
    options = csv.WriteOptions(quoting_style="needed")
    with csv.CSVWriter(sys.stdout.buffer, SCHEMA, write_options=options) as writer:
        for table in tables:
            writer.write_table(table)


def _print_table(totals: list[pyarrow.Table]) -> None:
    """Means over layers: neighbours of a run, its first and last, and pairs of corpora."""
    from ke_ray.core.similarity import NAMES
    from ke_ray.results.columns import TABLES

    titles = {column.name: column.title for column in TABLES["comparison"]}
    table = Table("from", "to", *(titles[name] for name in NAMES))
    for column in table.columns[2:]:
        column.justify = "right"
    for rows in (part.to_pylist() for part in totals):
        # Pairs come in the order of their first member, so the last one of a checkpoint is with
        # its predecessor.
        shown = list({(row["to_checkpoint"], row["to_corpus"]): row for row in rows}.values())
        if len(shown) > 1:
            shown.append(rows[len(shown) - 1])  # the first checkpoint and the last
        for row in shown:
            ends = (
                f"{row[f'{end}_checkpoint']} on {row[f'{end}_corpus']}" for end in ("from", "to")
            )
            values = ("–" if row[name] is None else f"{row[name]:.4f}" for name in NAMES)
            table.add_row(*(Text(printable(end)) for end in ends), *values)
    Console(markup=False, emoji=False).print(table)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(compare)
