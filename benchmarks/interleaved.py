"""Interleaved timing: every contender once per round, so that a busy machine slows all alike.

CPU time is compared, not wall-clock time (unless a GPU does the work): on a shared machine
wall-clock ratios of one pair were seen between 2 and 8, CPU ratios between 2.7 and 4.1. A ratio is
taken within each round and the median over rounds is reported with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """A ratio of CPU times over rounds, and the bound it is held against."""

    median: float
    low: float
    high: float
    rounds: int
    target: str

    def as_json(self) -> dict[str, float | int | str]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def run_rounds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[str], None] = lambda _text: None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """CPU seconds of this process by contender, one number a round; one warm-up is not counted.

    ``clock`` reads other seconds (:func:`clock_of`). The order is reversed in every second round,
    so that nobody always follows the same one.
    """
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            start = clock()
            contenders[name]()
            seconds[name].append(clock() - start)
        progress(f"round {number + 1} of {rounds}")
    return seconds


def clock_of(device: Any) -> Callable[[], float]:
    """CPU seconds of this process, or wall-clock seconds once a GPU has done what it was asked."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def ratio(numerator: list[float], denominator: list[float], target: str) -> Ratio:
    """Median and quartiles of numerator/denominator, round by round."""
    values = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    else:
        low = high = values[0]
    return Ratio(statistics.median(values), low, high, len(values), target)
