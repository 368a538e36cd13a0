"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from ke_ray.checkpoints.reference import CheckpointRef
    from ke_ray.training.loop import Progress as TrainingProgress

__all__ = ["ScanDisplay", "TrainingDisplay", "duration"]

_LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03`` or ``–`` where it is not known."""
    if seconds != seconds or seconds == float("inf"):
        return "–"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ScanDisplay:
    """Checkpoints done, failed and left, tokens/s, and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._done = self._failed = self._total = 0
        self._num_tokens = self._scored = 0
        self._first: tuple[float, int] | None = None
        self._printed = 0.0

    def start(self, *, num_checkpoints: int, num_skipped: int, num_tokens: int) -> None:
        """See ``ke_ray.engine.scan.run.ScanProgress``."""
        self._total, self._num_tokens = num_checkpoints, num_tokens
        if num_skipped:
            print(f"{num_skipped} checkpoints are finished already and skipped.", file=sys.stderr)
        if not num_checkpoints:
            return
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._text(), total=num_tokens)

    def tokens(self, num_tokens: int) -> None:
        """See ``ke_ray.engine.scan.run.ScanProgress``."""
        self._scored = max(self._scored, num_tokens)
        if self._first is None and num_tokens:
            self._first = (time.monotonic(), num_tokens)
        self._show()

    def checkpoint(self, ref: CheckpointRef, rows: Sequence[dict[str, Any]]) -> None:
        """See ``ke_ray.engine.scan.run.ScanProgress``."""
        if any(row["status"] != "ok" for row in rows):
            self._failed += 1
        else:
            self._done += 1
        self._show()

    def stop(self) -> None:
        """See ``ke_ray.engine.scan.run.ScanProgress``."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._total:
            print(self._text(), file=sys.stderr)

    def _text(self) -> str:
        left = self._total - self._done - self._failed
        text = f"scan: {self._done} done, {self._failed} failed, {left} left"
        if self._first is not None:
            started, before = self._first
            elapsed_s = time.monotonic() - started
            # The rate leaves out start-up: it counts from the first tokens that were reported.
            rate = (self._scored - before) / elapsed_s if elapsed_s > 0.5 else 0.0
            if rate > 0:
                text += f", {rate:,.0f} tokens/s"
            if rate > 0 and left:
                seconds_left = max(self._num_tokens - self._scored, 0) / rate
                text += f", {duration(seconds_left)} left"
        return text

    def _show(self) -> None:
        if self._bar is not None:
            task = self._bar.tasks[0]
            self._bar.update(task.id, completed=self._scored, description=self._text())
        elif time.monotonic() - self._printed >= _LINE_EVERY_S:
            self._printed = time.monotonic()
            print(self._text(), file=sys.stderr, flush=True)


class TrainingDisplay:
    """Step, loss, learning rate, tokens/s, time left and next injection of training runs."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._printed = 0.0

    def title(self, title: str) -> None:
        """Name the run that is shown from now on."""
        if title != self._title:
            self.stop()
            self._title = title

    def __call__(self, progress: TrainingProgress, next_injection: int | None = None) -> None:
        """Show one look at the loss."""
        text = self._text(progress, next_injection)
        is_last = progress.record.step == progress.num_steps
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bar.start()
                self._bar.add_task(text, total=progress.num_steps)
            task = self._bar.tasks[0]
            self._bar.update(task.id, completed=progress.record.step, description=text)
            if is_last:
                self.stop()
                print(text, file=sys.stderr)
        elif is_last or time.monotonic() - self._printed >= _LINE_EVERY_S:
            self._printed = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, progress: TrainingProgress, next_injection: int | None) -> str:
        record = progress.record
        text = (
            f"{self._title}: step {record.step}/{progress.num_steps}, loss {record.loss:.3f}, "
            f"lr {record.learning_rate:.2e}, {record.tokens_per_s:,.0f} tokens/s, "
            f"{duration(progress.time_left_s)} left"
        )
        return text if next_injection is None else f"{text}, next injection at {next_injection}"
