"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ke_ray.outcomes import Display, Outcome

_LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03`` or ``–`` where it is not known."""
    if seconds != seconds or seconds == float("inf"):
        return "–"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TerminalDisplay(Display):
    """Items done, failed and left, tokens per second, and the time left.

    Args:
        command: ``scan``, ``pretrain``, ``continual`` or ``sweep``.
        items: what its items are called: ``checkpoints``, ``runs`` or ``trials``.
    """

    def __init__(self, command: str, items: str) -> None:
        self._command, self._items = command, items
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._num_items = 0
        self._counts: Counter[str] = Counter()
        self._started = self._printed = 0.0
        self._num_tokens = self._total = 0
        self._first: tuple[float, int] | None = None
        self._note = ""

    def start(self, *, num_items: int, num_skipped: int, note: str = "") -> None:
        if num_skipped:
            self._print(f"{num_skipped} {self._items} are finished already and skipped.")
        if note:
            self._print(f"{self._command}: {num_items} {self._items}, {note}")
        self._num_items, self._started = num_items, time.monotonic()
        if num_items and self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._text(), total=None)

    def tokens(self, num_tokens: int, total: int, note: str = "") -> None:
        self._num_tokens, self._total = max(self._num_tokens, num_tokens), total
        self._note = note
        if self._first is None and num_tokens:
            self._first = (time.monotonic(), num_tokens)
        self._show(is_due=time.monotonic() - self._printed >= _LINE_EVERY_S)

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        statuses = {row["status"] for row in rows}
        self._counts["failed" if "failed" in statuses else next(iter(statuses), "ok")] += 1
        if self._total:  # tokens say more
            self._show(is_due=time.monotonic() - self._printed >= _LINE_EVERY_S)
            return
        self._note = f"{name}: {_result(rows[-1])}"
        self._show(is_due=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._num_tokens or self._counts:
            self._print(self._text())

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def _show(self, *, is_due: bool) -> None:
        if self._bar is not None:
            done, total = self._num_tokens, self._total
            if not total:
                done, total = self._counts.total(), self._num_items
            task = self._bar.tasks[0]
            self._bar.update(task.id, completed=done, total=total, description=self._text())
        elif is_due:
            self._print(self._text())

    def _text(self) -> str:
        num_ended = self._counts.total()
        left = self._num_items - num_ended
        parts = []
        if self._num_items > 1:
            counts = {"done": self._counts["ok"], "failed": self._counts["failed"], "left": left}
            if self._counts["stopped"]:
                counts["stopped early"] = self._counts["stopped"]
            parts = [f"{number} {word}" for word, number in counts.items()]
        seconds_left = None
        if self._first is not None:
            started, before = self._first
            elapsed_s = time.monotonic() - started
            # The rate leaves out start-up: it counts from the first tokens that were reported.
            rate = (self._num_tokens - before) / elapsed_s if elapsed_s > 0.5 else 0.0
            if rate > 0:
                parts.append(f"{rate:,.0f} tokens/s")
                seconds_left = max(self._total - self._num_tokens, 0) / rate
        elif num_ended:
            seconds_left = (time.monotonic() - self._started) / num_ended * left
        if seconds_left is not None and left:
            parts.append(f"about {duration(seconds_left)} left")
        text = f"{self._command}: " + ", ".join(parts or ["started"])
        return f"{text}; {self._note}" if self._note else text


def _result(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['error']}"
    parts = [
        f"{name} {100 * row[column]:+.1f} %"
        for name, column in (("A", "acquisition"), ("F", "forgetting"))
        if row.get(column) is not None
    ]
    return ", ".join(parts) or "ok"


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
