"""What the scorers of a scan ask for and tell while they run."""

from __future__ import annotations

from collections.abc import Collection

from ke_ray.planning.scan_dealing import Deal, Dealer


class ScanMonitor:
    """Deals items and counts tokens for all scorers; a small actor that needs no CPU of its own.

    An actor imports the module of its class: this one has no need of torch.
    """

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
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

    def take(self, ticket: int, scorer: str) -> tuple[Deal | None, bool]:
        """The next item for a scorer; and, where there is none, whether there will be none."""
        deal = self._dealer.take(ticket, scorer)
        return deal, deal is None and self._dealer.is_over()

    def begin(self, item: int) -> None:
        """A scorer begins with an item."""
        self._dealer.begin(item)

    def end(self, item: int) -> None:
        """An item is scored, and its answer is about to leave."""
        self._dealer.end(item)

    def update(self, lost: Collection[str]) -> None:
        """Which scorers are dead, or restart, at the moment."""
        self._dealer.update(lost)

    def report(self, item: int, num_tokens: int, busy_s: float) -> None:
        """Tokens scored of an item so far, and the seconds that took."""
        self._scored[item] = (num_tokens, busy_s)

    def scored(self) -> tuple[int, float]:
        """Tokens and seconds of all items so far; what was given back does not count."""
        counted = [self._scored[item] for item in self._dealer.items & self._scored.keys()]
        return sum(tokens for tokens, _ in counted), sum(seconds for _, seconds in counted)
