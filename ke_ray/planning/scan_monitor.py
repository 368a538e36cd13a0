"""What the scorers of a scan tell its driver while they run."""

from __future__ import annotations


class ScanMonitor:
    """Counts attempts and tokens for all scorers; a small actor that needs no CPU of its own.

    An actor imports the module of its class: this one has no need of torch.
    """

    def __init__(self) -> None:
        self._attempts: dict[int, int] = {}
        self._scored: dict[int, tuple[int, float]] = {}
        self._warned = False
        self._warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Pass on a warning of a scorer; the first one speaks for all."""
        if not self._warned:
            self._warned = True
            self._warnings.append(text)

    def take_warnings(self) -> list[str]:
        """Warnings since the last call."""
        taken, self._warnings = self._warnings, []
        return taken

    def begin(self, item: int) -> int:
        """Count an attempt at an item; returns how many there were, this one included."""
        self._attempts[item] = self._attempts.get(item, 0) + 1
        self._scored[item] = (0, 0.0)
        return self._attempts[item]

    def attempts(self, item: int) -> int:
        """How many attempts at an item have started."""
        return self._attempts.get(item, 0)

    def report(self, item: int, num_tokens: int, busy_s: float) -> None:
        """Tokens scored of an item so far, and the seconds that took."""
        self._scored[item] = (num_tokens, busy_s)

    def scored(self) -> tuple[int, float]:
        """Tokens and seconds of all items so far."""
        tokens, seconds = zip(*self._scored.values(), strict=True) if self._scored else ((), ())
        return sum(tokens), sum(seconds)
