"""``ke-ray report`` and ``ke-ray dashboard``: views of results."""

from __future__ import annotations

from typing import Annotated

import typer

from ke_ray.report import build_report
from ke_ray.report.dashboard import start_dashboard

_DEMO = "runs/demo"


def report(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULTS…", help="Result folders, or folders of them.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file.")] = "report.html",
) -> None:
    """Write one self-contained HTML file from result folders."""

    written = build_report(results, output)
    typer.echo(f"Report: {written}")


def dashboard(
    results: Annotated[
        list[str] | None, typer.Argument(metavar="[RESULTS…]", help="Result folders; default runs.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help=f"Show {_DEMO}.")] = False,
    host: Annotated[
        str, typer.Option(help="Any but loopback shows the results to others.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: 8501, or a free one.")] = None,
    mlflow_uri: Annotated[str | None, typer.Option(help="A running server, or SQLite.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Default: 5000, or free.")] = None,
    log: Annotated[str | None, typer.Option(help="File for the servers' output.")] = None,
) -> None:
    """Explore results in a browser, with MLflow's UI beside it, until Ctrl-C."""

    paths = [_DEMO] if demo else (results or ["runs"])
    with start_dashboard(
        paths,
        host=host,
        port=port,
        mlflow_uri=mlflow_uri,
        mlflow_port=mlflow_port,
        log=log,
        say=typer.echo,
    ) as pages:
        pages.wait()


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(report)
    app.command()(dashboard)
