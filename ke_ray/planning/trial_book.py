"""What the driver of a sweep tells its trials, and how often each has started."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any


class TrialBook:
    """Holds the configs of trials and counts their attempts; an actor that outlives the trials.

    Tune writes what it passes to a trial into files of its own, and sources may hold a login. So
    Tune passes a name. An actor imports the module of its class: this one has no need of torch.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._configs: dict[str, dict[str, Any]] = {}
        self._attempts: Counter[str] = Counter()
        self._first_at: float | None = None

    def put(self, name: str, config: dict[str, Any]) -> None:
        """Store the config of a trial."""
        self._configs[name] = config

    def begin(self, name: str) -> dict[str, Any] | None:
        """Count another attempt at a trial, and give its config; None where there were enough."""
        if self._attempts[name] >= self._max_attempts:
            return None
        self._attempts[name] += 1
        self._first_at = self._first_at or time.time()
        return self._configs[name]

    def summary(self) -> tuple[float | None, dict[str, int]]:
        """When the first attempt started (Unix seconds), and the attempts at each trial."""
        return self._first_at, dict(self._attempts)
