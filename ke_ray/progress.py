"""How far a command is: items done, failed and left, its rates, and the time left with its spread.

Commands show it (``ke_ray.cli.progress``), and keep it in a file of their output folder while they
run, from which ``ke-ray status`` reads it (``ke_ray.results.status``).
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ke_ray.secrets import printable

_MAX_SAMPLES = 1024
_MAX_FAILURES = 10
_SETTLED_S = 0.5
_NO_UPPER_END = 0.9  # a relative error from which on the longest time means nothing
#: Number of blocks → 97.5 % point of Student's t with one degree of freedom less.
_STUDENT = {4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the end: expected, and the ends of a 95 % interval.

    Attributes:
        low_s: None where too little is done to tell.
        high_s: None too where the speed varies so much that there is no upper end.
    """

    expected_s: float
    low_s: float | None = None
    high_s: float | None = None

    def __str__(self) -> str:
        text = f"about {duration(self.expected_s)} left"
        if self.low_s is None:
            return text
        if self.high_s is None:
            return f"{text} (at least {duration(self.low_s)})"
        return f"{text} ({duration(self.low_s)} to {duration(self.high_s)})"


class Pace:
    """Work done over time, the rate that follows, and when the rest will be done.

    The rate counts from the first sample, which leaves a start-up before it out. For the spread,
    the time since then is cut into n ≤ 8 blocks of equal length, with work w₁ … wₙ. Blocks as
    uneven as these are expected in the time left, m blocks long, so that its relative error is
    t · sd(w)/mean(w) · √(1/n + 1/m), with Student's t.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []  # (seconds, work); others may read meanwhile

    def add(self, at_s: float, work: float) -> None:
        """Take a sample: all work done until ``at_s``. Less than before (a retry) is left out."""
        if self._samples and (at_s <= self._samples[-1][0] or work < self._samples[-1][1]):
            return
        self._samples.append((at_s, work))
        if len(self._samples) > _MAX_SAMPLES:
            self._samples = [*self._samples[:-1:2], self._samples[-1]]

    @property
    def rate(self) -> float | None:
        """Work per second; None where there is too little to tell."""
        return _rate(tuple(self._samples))

    def left(self, work: float, now_s: float) -> TimeLeft | None:
        """The time that ``work`` more takes, counted from ``now_s``."""
        samples = tuple(self._samples)
        rate = _rate(samples)
        if rate is None:
            return None
        since = now_s - samples[-1][0]
        total_s = max(work, 0.0) / rate
        expected = max(total_s - since, 0.0)
        error = _relative_error(samples, total_s)
        if error is None:
            return TimeLeft(expected)
        low = max(total_s / (1 + error) - since, 0.0)
        high = max(total_s / (1 - error) - since, 0.0) if error < _NO_UPPER_END else None
        return TimeLeft(expected, low, high)


def _rate(samples: Sequence[tuple[float, float]]) -> float | None:
    if len(samples) < 2 or samples[-1][0] - samples[0][0] <= _SETTLED_S:
        return None
    rate = (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
    return rate if rate > 0 else None


def _relative_error(samples: Sequence[tuple[float, float]], total_s: float) -> float | None:
    """Half of the 95 % interval of the work's rate over the next ``total_s``, relative to it."""
    number = min(max(_STUDENT), len(samples) - 1)
    if number not in _STUDENT or total_s <= 0:
        return None
    first, length = samples[0][0], (samples[-1][0] - samples[0][0]) / number
    ends = [_work_at(samples, first + length * i) for i in range(number + 1)]
    work = [after - before for before, after in itertools.pairwise(ends)]
    mean = sum(work) / number
    deviation = math.sqrt(sum((w - mean) ** 2 for w in work) / (number - 1))
    return _STUDENT[number] * deviation / mean * math.sqrt(1 / number + length / total_s)


def _work_at(samples: Sequence[tuple[float, float]], at_s: float) -> float:
    """Work done until ``at_s``, linear between samples."""
    right = min(max(bisect_left(samples, (at_s,)), 1), len(samples) - 1)
    (before, low), (after, high) = samples[right - 1], samples[right]
    return low + (min(max(at_s, before), after) - before) / (after - before) * (high - low)


@dataclass
class Progress:
    """State of a command's items; what is shown and written derives from it.

    Attributes:
        command: ``scan``, ``pretrain``, ``continual`` or ``sweep``.
        items: what its items are called: ``checkpoints``, ``runs`` or ``trials``.
        num_items, num_skipped: items to do now, and those that were finished before.
        counts: items that ended, by status: ``ok``, ``failed``, ``stopped``.
        num_tokens, total_tokens: of all items to do; 0 where no tokens are counted.
        num_bytes: of checkpoints that were fetched or read so far, where that is known.
        failures: the first few (item, error).
        note: what happens at the moment.
    """

    command: str
    items: str
    num_items: int = 0
    num_skipped: int = 0
    counts: Counter[str] = field(default_factory=lambda: Counter(ok=0, failed=0, stopped=0))
    num_tokens: int = 0
    total_tokens: int = 0
    num_bytes: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""
    started_at: float = field(default_factory=time.time)
    worked_at: float | None = None
    _items_pace: Pace = field(default_factory=Pace)
    _tokens_pace: Pace = field(default_factory=Pace)

    def start(self, num_items: int, num_skipped: int) -> None:
        """The items are known, and work begins."""
        self.num_items, self.num_skipped = num_items, num_skipped
        self._items_pace.add(time.monotonic(), 0)

    def tokens(self, num_tokens: int, total: int, note: str) -> None:
        """So many tokens of all items are done."""
        if num_tokens > self.num_tokens:
            self.worked_at = time.time()
            self._tokens_pace.add(time.monotonic(), num_tokens)
        self.num_tokens, self.total_tokens = max(self.num_tokens, num_tokens), total
        self.note = one_line(note)

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One item has ended; its result rows, each with its ``status``."""
        statuses = {row["status"] for row in rows}
        status = "failed" if "failed" in statuses else next(iter(statuses), "ok")
        self.counts[status] += 1
        self.worked_at = time.time()
        self._items_pace.add(time.monotonic(), self.counts.total())
        if status == "failed" and len(self.failures) < _MAX_FAILURES:
            error = next(row.get("error") for row in rows if row["status"] == "failed")
            self.failures.append((name, str(error or "")))

    @property
    def left(self) -> int:
        """Items that have not ended."""
        return self.num_items - self.counts.total()

    @property
    def tokens_per_s(self) -> float | None:
        """Of this command, start-up left out; None where it is not known (yet)."""
        return self._tokens_pace.rate

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of checkpoints over the time since the command began its work."""
        seconds = time.time() - self.started_at
        return self.num_bytes / seconds if self.num_bytes and seconds > _SETTLED_S else None

    @property
    def time_left(self) -> TimeLeft | None:
        """By tokens where they are counted, else by items."""
        if not self.left:
            return None
        now = time.monotonic()
        by_tokens = self._tokens_pace.left(self.total_tokens - self.num_tokens, now)
        return by_tokens or (None if self.total_tokens else self._items_pace.left(self.left, now))

    def line(self, width: int | None = None) -> str:
        """One line; on a narrow terminal what matters less is left out.

        Args:
            width: columns that it must fit in; None: any.
        """
        parts = []
        if self.num_items > 1 or self.num_skipped:
            counts = {"done": self.counts["ok"], "failed": self.counts["failed"], "left": self.left}
            counts |= {"stopped early": self.counts["stopped"]} if self.counts["stopped"] else {}
            parts.append(", ".join(f"{number} {word}" for word, number in counts.items()))
        time_left = self.time_left
        if time_left is not None:
            parts.append(str(time_left))
        if (rate := self.tokens_per_s) is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        if (rate := self.bytes_per_s) is not None:
            parts.append(f"{rate / 1e6:,.1f} MB/s of checkpoints")
        if self.note:
            parts.append(self.note)
        text = f"{self.command}: " + (", ".join(parts) or "started")
        if width is None or len(text) <= width:
            return text
        if time_left is not None:
            parts[parts.index(str(time_left))] = f"about {duration(time_left.expected_s)} left"
        text = f"{self.command}: {parts[0] if parts else 'started'}"
        for part in parts[1:]:
            if len(text) + len(part) + 2 <= width:
                text += f", {part}"
        return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"

    def as_json(self) -> dict[str, Any]:
        """What is kept in the output folder."""
        time_left = self.time_left
        return {
            "command": self.command,
            "items": self.items,
            "total": self.num_items + self.num_skipped,
            "done": self.counts["ok"] + self.num_skipped,
            "failed": self.counts["failed"],
            "stopped_early": self.counts["stopped"],
            "left": self.left,
            "num_tokens": self.num_tokens,
            "total_tokens": self.total_tokens,
            "tokens_per_s": self.tokens_per_s,
            "bytes_per_s": self.bytes_per_s,
            "seconds_left": time_left and time_left.expected_s,
            "seconds_left_low": time_left and time_left.low_s,
            "seconds_left_high": time_left and time_left.high_s,
            "note": self.note,
            "failures": [list(failure) for failure in self.failures],
            "started_at": self.started_at,
            "worked_at": self.worked_at,
            "updated_at": time.time(),
        }


def one_line(text: str) -> str:
    """A text from outside as one line that no terminal takes for a command."""
    return printable(" ".join(text.split()))


def duration(seconds: float) -> str:
    """``2 d 3:04:05``, ``1:02:03``, ``2:03``, or ``–`` where it is not known."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
