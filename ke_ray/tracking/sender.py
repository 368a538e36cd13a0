"""The thread that writes to MLflow, so that nothing that is measured waits for a server."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ke_ray.secrets import redact

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 5.0
#: Shorter outages are not worth a word, and a failure this recent needs no second look.
_BRIEF_S = 5.0


@dataclass
class Outage:
    """What a process knows of a store that does not answer; all writers to the store share it.

    Attributes:
        unsent: writes that their senders gave up, for the next one that finds the store there.
    """

    store: str
    unsent: deque[tuple[str, Callable[[], None]]] = field(default_factory=deque)
    since: float | None = None
    last: float = 0.0
    is_logged: bool = False

    @property
    def is_fresh(self) -> bool:
        """Whether the store failed a moment ago, so that asking it again would be in vain."""
        return self.since is not None and time.monotonic() - self.last < _BRIEF_S

    def failed(self, error: Exception, started: float) -> None:
        """An attempt failed, which ``started`` at that monotonic second; logged once per outage."""
        self.since, self.last = self.since or started, time.monotonic()
        if not self.is_logged and self.last - self.since > _BRIEF_S:
            self.is_logged = True
            log.warning(
                "MLflow at '%s' does not answer (%s). The work goes on; what is to be logged is "
                "kept and sent when it answers again.",
                *(self.store, _reason(error)),
            )

    def ended(self) -> None:
        """The store answers."""
        if self.is_logged:
            log.warning("MLflow at '%s' answers again.", self.store)
        self.since, self.is_logged = None, False


_outages: dict[str, Outage] = {}


def outage_of(store: str) -> Outage:
    """This process's record of a store, so that its next run need not find out anew."""
    return _outages.setdefault(store, Outage(redact(store)))


class Sender(threading.Thread):
    """Runs writes in order, each until it succeeds.

    A store that is away holds the writes back for as long as the process works. Only where somebody
    waits for them (``flush``, ``stop``) is the store given up, once it has failed for
    ``give_up_after_s`` (default ``KE_RAY_MLFLOW_GIVE_UP_S``, else 30): then all that is left is put
    aside at once, not each write in its turn. A later sender of the process sends it, before its
    own, if the store is there again. A write that the store refuses for what it says is not tried
    again.

    Attributes:
        lost: what did not reach the store through this sender.
    """

    def __init__(self, outage: Outage | None = None, give_up_after_s: float | None = None) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self.outage = outage or Outage("the store")
        if give_up_after_s is None:
            give_up_after_s = float(os.environ.get("KE_RAY_MLFLOW_GIVE_UP_S", "30"))
        self._give_up_after_s = give_up_after_s
        self._is_awaited = False
        self._queue: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._logged: set[str] = set()
        self.lost: list[str] = []

    def put(self, what: str, write: Callable[[], None]) -> None:
        self._queue.put((what, write))

    def run(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._send(*entry)
            self._queue.task_done()
        self._queue.task_done()

    def _send(self, what: str, write: Callable[[], None]) -> None:
        pause_s = 0.2
        while not (self.outage.is_fresh and self._is_given_up):
            if self._try_all(what, write):
                return
            if not self._is_given_up:
                time.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0 if self._is_awaited else _LONGEST_PAUSE_S)
        self.lost.append(what)
        self.outage.unsent.append((what, write))

    def _try_all(self, what: str, write: Callable[[], None]) -> bool:
        """One attempt at what other senders left and at this write; whether it is dealt with."""
        unsent = self.outage.unsent
        while unsent:
            if not self._try(*unsent[0]):
                return False
            unsent.popleft()
        return self._try(what, write)

    def _try(self, what: str, write: Callable[[], None]) -> bool:
        """Whether a write was sent or refused; False where the store is not there."""
        started = time.monotonic()
        try:
            write()
        except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' kinds
            if not _is_refusal(error):
                self.outage.failed(error, started)
                return False
            reason = _reason(error)
            if reason not in self._logged:
                log.warning("MLflow: gave up on %s: %s", what, reason)
                self._logged.add(reason)
            self.lost.append(what)
        else:
            self.outage.ended()
        return True

    @property
    def _is_given_up(self) -> bool:
        since = self.outage.since
        if since is None or not self._is_awaited:
            return False
        return time.monotonic() - since > self._give_up_after_s

    def flush(self) -> None:
        """Wait until everything so far is written or given up."""
        self._is_awaited = True
        self._queue.join()
        self._is_awaited = False

    def stop(self) -> None:
        self._is_awaited = True
        self._queue.put(None)
        self.join()


def _reason(error: Exception) -> str:
    system = re.findall(r"\[Errno -?\d+\] ([^'\")\]]+)", str(error))
    if system:
        return str(system[-1])  # "Connection refused", without what requests wraps it in
    return redact(str(error)).splitlines()[0] if str(error) else repr(error)


def _is_refusal(error: Exception) -> bool:
    """Whether the same write would be refused for ever: bad content, no right, no such file."""
    if isinstance(error, FileNotFoundError):
        return True
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)
