"""``ke-ray relate``: which measure of a start goes with what continual learning makes of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ke_ray import storage
from ke_ray.cli.options import RowsOutput, check_rows_output
from ke_ray.errors import ConfigError
from ke_ray.secrets import printable

if TYPE_CHECKING:
    import pandas


def relate(
    scan: Annotated[str, typer.Argument(metavar="SCAN", help="The scan of the starts.")],
    studies: Annotated[
        list[str], typer.Argument(metavar="CONTINUAL…", help="Continual studies from them.")
    ],
    corpus: Annotated[
        str | None, typer.Option(help="That measures were taken on; default: the scan's first.")
    ] = None,
    output: RowsOutput = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every row as CSV.")] = False,
) -> None:
    """Correlate every measure of the starts with A, F, ΔK and ΔP, also at fixed step and loss."""
    from ke_ray.report import relation
    from ke_ray.report.sources import find_results
    from ke_ray.results.columns import to_table

    check_rows_output(output)
    scans, others = find_results([scan]), find_results(studies)
    if len(scans) != 1 or not others:
        raise ConfigError(
            f"'{scan}' has {len(scans)} results and the studies {len(others)}; expected one scan "
            "and at least one continual study."
        )
    table = relation.relate(scans[0], others, corpus)
    if output is not None:
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        storage.write_table(output, to_table("relation", rows))
    if as_csv:
        print(table.to_csv(index=False), end="")
        return
    _print_table(table)
    if output is not None:
        typer.echo(f"Every correlation: {output}")


def _print_table(table: pandas.DataFrame) -> None:
    """Pearson's r as it is and with what is held fixed, strongest of the latter first."""

    from ke_ray.report.relation import OUTCOMES

    held = table["fixed"].max()
    own = table[table["kind"] == "pearson"].set_index(["measure", "outcome", "fixed"])
    fixed = own.xs(held, level="fixed")
    shown = Table("measure", "", "starts", "r", "r*", "95 % of r*", "p (Holm)", box=box.SIMPLE_HEAD)
    for column in shown.columns:
        column.justify, column.overflow = "right", "fold"
    shown.columns[0].justify = "left"
    for measure, outcome in fixed["r"].abs().sort_values(ascending=False).index:
        plain, row = own.loc[(measure, outcome, "")], fixed.loc[(measure, outcome)]
        if math.isnan(plain["r"]):
            continue  # the studies do not have this outcome
        no_value = math.isnan(row["r"])
        interval = "–" if no_value else f"{_signed(row['low'])} to {_signed(row['high'])}"
        p = "–" if no_value else f"{row['p_holm']:.2g}"
        cells = (str(int(row["num_starts"])), _signed(plain["r"]), _signed(row["r"]), interval, p)
        shown.add_row(printable(measure), OUTCOMES[outcome], *cells)
    console = Console(markup=False, emoji=False)
    console.print(shown)
    tests = int(fixed["p"].notna().sum())
    console.print(f"r* holds {held} fixed; its p (Holm) is adjusted for {tests} correlations.")


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(relate)
