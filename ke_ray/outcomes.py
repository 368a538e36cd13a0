"""What a command shows while it runs, and what came of it: the same for scans, runs and sweeps.

An *item* is a checkpoint of a scan, a run of a continual study or a trial of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Display:
    """A display that shows nothing; the terminal's is ``ke_ray.cli.progress.TerminalDisplay``."""

    def say(self, text: str) -> None:
        """A line about how the work is going to be done, before it starts."""

    def start(self, *, num_items: int, num_skipped: int, note: str = "") -> None:
        """Before the first item: those to do, and those that are finished already."""

    def tokens(self, num_tokens: int, total: int, note: str = "") -> None:
        """Tokens of all items so far, of how many, about once per second."""

    def loaded(self, num_bytes: int) -> None:
        """Bytes of checkpoints that were fetched or read so far."""

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One item has ended; its result rows, each with its ``status``."""

    def stop(self) -> None:
        """After the last item."""


@dataclass
class Outcome:
    """What came of a command.

    Attributes:
        num_done, num_skipped: items that this command finished, and that were finished before.
        rows: of the table of runs or trials, those that were finished before included.
        failures: (item, error) of those that failed.
        phases_s: seconds that each phase of the command took.
    """

    output: str
    num_done: int = 0
    num_skipped: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    phases_s: dict[str, float] = field(default_factory=dict)
    mlflow_run_id: str | None = None

    def set_rows(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of all runs or trials that have ended."""
        self.rows = rows
        self.failures = [(row["run"], row["error"]) for row in rows if row["status"] == "failed"]
        self.num_done = len(rows) - len(self.failures) - self.num_skipped

    @property
    def exit_code(self) -> int:
        """1 where an item failed, else 0."""
        return 1 if self.failures else 0


@dataclass
class ScanOutcome(Outcome):
    """What came of a scan, whose rows are in its result folder alone.

    Attributes:
        num_done, num_tokens: checkpoints and tokens that were scored now.
        timings: seconds of fetch, load, score and wait, one entry per work item.
    """

    num_tokens: int = 0
    timings: list[dict[str, float]] = field(default_factory=list)


@dataclass
class PretrainOutcome(Outcome):
    """What came of a pretraining run, the one item of its command.

    Attributes:
        first_loss, final_loss: nats per token, of the first and the last step.
    """

    checkpoint_steps: tuple[int, ...] = ()
    num_tokens: int = 0
    first_loss: float = math.nan
    final_loss: float = math.nan
    duration_s: float = math.nan


@dataclass
class SweepOutcome(Outcome):
    """What came of a sweep; ``missing`` has the objectives that no trial reported."""

    missing: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where a trial failed or an objective was never reported, else 0."""
        return 1 if self.failures or self.missing else 0
