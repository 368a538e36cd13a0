"""``ke-ray weights``: geometry of the weight matrices of a scan's checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from ke_ray import storage
from ke_ray.cli.options import CacheBytes, CacheDir
from ke_ray.secrets import printable


def weights(
    scan: Annotated[str, typer.Argument(metavar="SCAN", help="A scan folder.")],
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
) -> None:
    """Add norms, ranks and distances of weight matrices to a scan, without a forward pass."""
    from ke_ray.evaluation.weights import measure_weights

    failed = []

    def show(name: str, error: str | None) -> None:
        if error is not None:
            failed.append(name)
        typer.echo(printable(f"{name}: {error or 'done'}"), err=True)

    measure_weights(scan, show, cache_dir=cache_dir, cache_bytes=cache_bytes)
    typer.echo(f"Weights: {storage.join(scan, 'weights.parquet')}")
    raise typer.Exit(1 if failed else 0)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(weights)
