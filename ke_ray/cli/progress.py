"""What a command says of itself: progress while it runs, and in the end what came of it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

from ke_ray import storage
from ke_ray.errors import KeRayError
from ke_ray.outcomes import Display, Outcome
from ke_ray.progress import Progress, one_line
from ke_ray.secrets import redact
from ke_ray.storage.ownership import PROGRESS

_LINE_EVERY_S, _SILENCE_S = 10.0, 60.0
_BEAT_S = 5.0
_BAR_COLUMNS = 24  # of the spinner, the bar and the elapsed time

log = logging.getLogger(__name__)


class TerminalDisplay(Display):
    """Items done, failed and left, tokens and bytes per second, and the time left.

    On a terminal that is one line that fits its width; elsewhere (a log, a pipe) plain lines, one
    every ten seconds while something happens and one every minute while nothing does. The same is
    kept in the output folder, which the command has claimed, from ``start`` to ``stop``.

    Args:
        command: ``scan``, ``pretrain``, ``continual`` or ``sweep``.
        items: what its items are called: ``checkpoints``, ``runs`` or ``trials``.
        output: the folder that the command writes.
    """

    def __init__(self, command: str, items: str, output: str) -> None:
        self._progress, self._output = Progress(command, items), output
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._printed = 0.0
        self._stopped = threading.Event()
        self._heart: threading.Thread | None = None

    def say(self, text: str) -> None:
        self._print(text)

    def start(self, *, num_items: int, num_skipped: int, note: str = "") -> None:
        progress = self._progress
        if num_skipped:
            self._print(f"{num_skipped} {progress.items} are finished already and skipped.")
        if note:
            self._print(f"{progress.command}: {num_items} {progress.items}, {note}")
        progress.start(num_items, num_skipped)
        if not num_items:
            return
        # Not Console.is_terminal, which FORCE_COLOR makes true of a file.
        if sys.stderr.isatty() and not self._console.is_dumb_terminal:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
            columns = (SpinnerColumn(), text, BarColumn(bar_width=10), TimeElapsedColumn())
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._bar.start()
            self._bar.add_task(self._line(), total=None)
        self._keep()
        self._heart = threading.Thread(target=self._beat, name="ke_ray-progress", daemon=True)
        self._heart.start()

    def tokens(self, num_tokens: int, total: int, note: str = "") -> None:
        self._progress.tokens(num_tokens, total, note)
        self._show(is_due=time.monotonic() - self._printed >= _LINE_EVERY_S)

    def loaded(self, num_bytes: int) -> None:
        self._progress.num_bytes = num_bytes

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._progress.ended(name, rows)
        if self._progress.total_tokens:  # tokens say more
            self._show(is_due=time.monotonic() - self._printed >= _LINE_EVERY_S)
            return
        self._progress.note = one_line(f"{name}: {_result(rows[-1])}")
        self._show(is_due=True)

    def stop(self) -> None:
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._heart is not None:
            self._heart.join(timeout=_BEAT_S)
            if not self._heart.is_alive():  # else it waits for a store that is out of order
                self._keep()  # which also removes what a killed command was writing
                with suppress(KeRayError, OSError):
                    storage.remove(storage.join(self._output, PROGRESS))
        if self._progress.num_tokens or self._progress.counts.total():
            self._print(self._progress.line(self._console.width if sys.stderr.isatty() else None))

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT_S):
            self._keep()
            self._show(is_due=time.monotonic() - self._printed >= _SILENCE_S)

    def _keep(self) -> None:
        """Write the progress into the output folder; trouble with that is no trouble."""
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        values = redact({**owner, **self._progress.as_json()})
        try:
            storage.write_json(storage.join(self._output, PROGRESS), values)
        except Exception as error:  # each driver has its own kinds; the next beat tries again
            log.debug("the progress of '%s' could not be written: %s", self._output, error)

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def _show(self, *, is_due: bool) -> None:
        progress, bar = self._progress, self._bar
        if bar is not None:
            done, total = progress.num_tokens, progress.total_tokens
            if not total:
                done, total = progress.counts.total(), progress.num_items
            task = bar.tasks[0].id
            bar.update(task, completed=done, total=total, description=self._line())
        elif is_due and not self._stopped.is_set():
            self._print(progress.line())

    def _line(self) -> str:
        return self._progress.line(max(self._console.width - _BAR_COLUMNS, 10))


def _result(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    parts = [
        f"{name} {100 * row[column]:+.1f} %"
        for name, column in (("A", "acquisition"), ("F", "forgetting"))
        if row.get(column) is not None
    ]
    return ", ".join(parts) or "ok"


@contextmanager
def command_display(command: str, items: str, output: str) -> Iterator[TerminalDisplay]:
    """A display for the block; an interrupt says what is saved."""
    display = TerminalDisplay(command, items, output)
    try:
        yield display
    except KeyboardInterrupt:
        from ke_ray.results.status import read_status, summary

        display.stop()
        with suppress(KeRayError, OSError):
            for study in read_status(output):
                print(f"Saved in {study.folder}: {summary(study)}.", file=sys.stderr)
        raise
    finally:
        display.stop()


def print_outcome(outcome: Outcome, done: str) -> None:
    """Print the failures of a command, then its counts, and where its results lie.

    Args:
        done: the first count with its words: ``4 scanned``.
    """
    for name, error in outcome.failures:
        typer.echo(f"failed: {name}: {error}", err=True)
    typer.echo(
        f"{done}, {len(outcome.failures)} failed, {outcome.num_skipped} skipped "
        f"(finished before). Results: {outcome.output}"
    )
