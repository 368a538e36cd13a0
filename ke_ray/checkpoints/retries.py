"""Failures of a transfer, and how often and how patiently it is tried again."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """The patience of a transfer; times in seconds.

    Pauses are ``backoff_s``, twice that, four times … at most ``max_pause_s``, each with up to a
    quarter more at random, so that many workers do not come back in step. A server's
    ``Retry-After`` takes precedence, up to ``max_retry_after_s``.
    """

    attempts: int = 6
    backoff_s: float = 1.0
    max_pause_s: float = 60.0
    max_retry_after_s: float = 600.0
    timeout_s: float = 30.0

    def pause_s(self, failures: int, retry_after_s: float | None) -> float:
        """Seconds to wait after the ``failures``-th failure in a row (from 1)."""
        if retry_after_s is not None:
            return min(retry_after_s, self.max_retry_after_s)
        pause = min(self.backoff_s * 2 ** min(failures - 1, 30), self.max_pause_s)
        return pause * (1 + random.random() / 4)


class TransferError(Exception):
    """An attempt failed.

    Attributes:
        final: whether another attempt would fail in the same way.
        after_s: seconds that the server asks to wait for.
        status: HTTP status of the answer; None where there was none.
        code: what the Hugging Face Hub says of the error (``X-Error-Code``).
        attempts: failures in a row, once no attempt was left.
    """

    def __init__(
        self,
        reason: str,
        *,
        final: bool = False,
        after_s: float | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.final = final
        self.after_s = after_s
        self.status = status
        self.code = code
        self.attempts = 0


class AbsentError(TransferError):
    """The source has no such file."""


class ChangedError(TransferError):
    """The file at the source is no longer the one of which a part has arrived."""


class Retries:
    """The failures in a row of one transfer, under a policy.

    Args:
        policy: how many and how long.
        stopped: ends a pause early.
    """

    def __init__(self, policy: RetryPolicy, stopped: threading.Event | None = None) -> None:
        self.policy = policy
        self.failures = 0
        self._stopped = stopped or threading.Event()

    def wait(
        self, retry_after_s: float | None = None, *, progressed: bool = False, final: bool = False
    ) -> bool:
        """Count a failure, then pause before the next attempt.

        Args:
            retry_after_s: what the server asks for.
            progressed: whether the failed attempt brought something; it is then the first failure.
            final: whether another attempt would fail in the same way.

        Returns:
            False, at once, where no attempt is left.
        """
        self.failures = 1 if progressed else self.failures + 1
        if final or self.failures >= self.policy.attempts:
            return False
        self._stopped.wait(self.policy.pause_s(self.failures, retry_after_s))
        return True
