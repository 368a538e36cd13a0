"""The thread that writes to MLflow, so that nothing that is measured waits for a server."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from ke_ray.secrets import redact

__all__ = ["Sender"]

log = logging.getLogger(__name__)

_GIVE_UP_AFTER_S = 180.0
_SILENT_S = 60.0


class Sender(threading.Thread):
    """Runs writes in order, each until it succeeds or the store is given up.

    A store that has failed for ``give_up_after_s`` is left alone for ``silent_s``: what is written
    meanwhile is lost at once, so that a scan of hundreds of checkpoints does not wait for each of
    its writes in turn. A write that the store refuses for what it says is not tried again.
    """

    def __init__(
        self, give_up_after_s: float = _GIVE_UP_AFTER_S, silent_s: float = _SILENT_S
    ) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self._give_up_after_s, self._silent_s = give_up_after_s, silent_s
        self._failing_since: float | None = None
        self._silent_until = 0.0
        self._queue: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self.lost: list[str] = []

    def put(self, what: str, write: Callable[[], None]) -> None:
        self._queue.put((what, write))

    def run(self) -> None:
        while (entry := self._queue.get()) is not None:
            what, write = entry
            self._send(what, write)
            self._queue.task_done()
        self._queue.task_done()

    def _send(self, what: str, write: Callable[[], None]) -> None:
        if time.monotonic() < self._silent_until:
            self.lost.append(what)
            return
        pause_s = 0.2
        while True:
            try:
                write()
                self._failing_since = None
                return
            except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' kinds
                now = time.monotonic()
                refused = _is_refusal(error)
                if not refused and self._failing_since is None:
                    self._failing_since = now
                is_gone = not refused and now - (self._failing_since or now) > self._give_up_after_s
                if refused or is_gone:
                    reason = redact(str(error)).splitlines()[0] if str(error) else repr(error)
                    log.warning("MLflow: gave up on %s: %s", what, reason)
                    self.lost.append(what)
                    self._silent_until = now + self._silent_s if is_gone else 0.0
                    return
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 5.0)

    def flush(self) -> None:
        self._queue.join()

    def stop(self) -> None:
        self._queue.put(None)
        self.join()


def _is_refusal(error: Exception) -> bool:
    """Whether the same write would be refused for ever: bad content, no right, no such file."""
    if isinstance(error, FileNotFoundError):
        return True
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)
