"""``ke-ray data``: the published data that studies read, and packing of large corpora."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ke_ray import storage
from ke_ray.data.published import fetch, find_published, list_published, missing_files

_FOLDER = "data"
_SHOW_EVERY_S = 10.0

data = typer.Typer(
    help="Published data that the shipped studies read, and packing of large corpora."
)

Folder = Annotated[str, typer.Option(help="The folder for data, by which studies name theirs.")]


@data.command("list")
def list_data(folder: Folder = _FOLDER) -> None:
    """List what is published: files here and in all, size, licence, page."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    for title in ("files", "size", "what", "licence", "page"):
        table.add_column(title, overflow="fold")
    for published in list_published().values():
        num_files = len(published.files)
        num_here = num_files - len(missing_files(published, Path(folder)))
        size = f"{published.size_bytes / 1e6:,.0f} MB"
        about = (published.title, published.licence, published.page)
        table.add_row(published.name, f"{num_here} of {num_files}", size, *about)
    Console().print(table)
    typer.echo(f"\nke-ray data fetch NAME… fetches into '{folder}'.")


@data.command("fetch")
def fetch_data(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="As `ke-ray data list`.")],
    folder: Folder = _FOLDER,
    mirror: Annotated[
        str | None, typer.Option(help="An address with the same files, as FOLDER/NAME below it.")
    ] = None,
) -> None:
    """Fetch published data and verify it; what is there is verified alone."""
    for published in [find_published(name) for name in names]:
        typer.echo(f"{published.name}: {published.title}. Licence: {published.licence}.")
        num_fetched = num_unverified = 0
        for file in fetch(published, Path(folder), mirror=mirror, say=typer.echo):
            num_fetched += file.fetched
            num_unverified += not file.verified
        place = Path(folder) / published.folder
        remark = f"; of {num_unverified} no sha256 is published" if num_unverified else ""
        num_files = len(published.files)
        typer.echo(f"{num_files} files in {place}, {num_fetched} of them new{remark}.")


@data.command("pack")
def pack(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Documents (docs/data.md).")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder or URI that all nodes see.")
    ],
    tokenizer: Annotated[str, typer.Option(help="File, folder or Hub repository.")],
    eos_token_id: Annotated[int, typer.Option(min=0, help="Put after each document.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a row, T.")],
) -> None:
    """Tokenise and pack a large corpus once, on all cores of the cluster, into files of rows."""
    from ke_ray.engine.data.pack import pack_corpus

    shown_at = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown_at
        if done == total or time.monotonic() - shown_at > _SHOW_EVERY_S:
            shown_at = time.monotonic()
            typer.echo(f"{what}: {done} of {total}", err=True)

    packed = pack_corpus(
        source,
        output,
        tokenizer=tokenizer,
        eos_token_id=eos_token_id,
        sequence_length=sequence_length,
        on_progress=show,
    )
    typer.echo(
        f"{packed['num_instances']:,} rows of {sequence_length:,} tokens, the source of token ids "
        f"{storage.join(output, 'rows')}"
    )


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.add_typer(data, name="data")
