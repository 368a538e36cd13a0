"""One MLflow run as the rest of the package sees it: what is logged goes to the sender's queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.secrets import redact
from ke_ray.tracking.sender import Sender

if TYPE_CHECKING:
    from ke_ray.tracking.tracker import Tracker

__all__ = ["TrackedRun"]

_MAX_VALUE_LENGTH = 5000


class TrackedRun:
    """One MLflow run; all methods but ``flush`` return at once. Without a tracker they do nothing.

    Attributes:
        run_id: None until the run is open: ``open`` is called before the first write is sent.
    """

    def __init__(
        self,
        run_id: str | None,
        tracker: Tracker | None,
        sender: Sender | None,
        open_run: Callable[[], tuple[str, set[str]]] | None = None,
    ) -> None:
        self.run_id = run_id
        self._tracker = tracker
        self._sender = sender
        self._open_run = open_run
        self._known_params: set[str] = set()
        self._held: list[Any] = []  # metrics that wait for others
        self._released = float("-inf")

    def open(self) -> str:
        """Find or create the run in the store; its id. Raises whatever MLflow does."""
        if self.run_id is None:
            assert self._open_run is not None
            self.run_id, self._known_params = self._open_run()
        return self.run_id

    def _put(self, what: str, write: Callable[[Any, str], None]) -> None:
        tracker = self._tracker
        if self._sender is None or tracker is None:
            return
        if self.run_id is None and self._open_run is None:
            return
        self._sender.put(f"the run's {what}", lambda: write(tracker.client, self.open()))

    def _put_batch(self, what: str, **batch: Any) -> None:
        self._put(what, lambda client, run_id: client.log_batch(run_id, **batch))

    def log_params(self, params: Mapping[str, Any], *, only_new: bool = False) -> None:
        """Flat parameters; long values are cut.

        With ``only_new`` those that a resumed run has stay: MLflow refuses to change one.
        """
        if self._tracker is None or not params:
            return
        entities = self._tracker._entities
        items = [entities.Param(k, _shown(v)) for k, v in params.items()]

        def write(client: Any, run_id: str) -> None:
            new = [item for item in items if not (only_new and item.key in self._known_params)]
            for start in range(0, len(new), 100):
                client.log_batch(run_id, params=new[start : start + 100])

        self._put("parameters", write)

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        timestamp_ms: int | None = None,
        *,
        hold_s: float = 0.0,
    ) -> None:
        """Metrics at one step; values that are not finite are left out.

        With a ``timestamp_ms`` of the caller's choice the same point may be logged again: MLflow
        keeps one of points that agree in all. With ``hold_s`` they may wait so long for later
        ones: a write costs the same 15 ms for one point and for many.
        """
        if self._tracker is None:
            return
        entities = self._tracker._entities
        stamp = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        items = [
            entities.Metric(name, float(value), stamp, int(step))
            for name, value in metrics.items()
            if value is not None and abs(float(value)) < float("inf")
        ]
        self._held += items
        if time.monotonic() - self._released >= hold_s:
            self._release()

    def _release(self) -> None:
        items, self._held = self._held, []
        self._released = time.monotonic()
        for start in range(0, len(items), 1000):
            self._put_batch("metrics", metrics=items[start : start + 1000])

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        if self._tracker is None:
            return
        entities = self._tracker._entities
        items = [entities.RunTag(k, _shown(v)) for k, v in tags.items()]
        for start in range(0, len(items), 100):
            self._put_batch("tags", tags=items[start : start + 100])

    def log_dataset(self, name: str, sha256: str, source: str, context: str) -> None:
        """A dataset with its fingerprint (MLflow shows the first 36 characters)."""
        if self._tracker is None:
            return
        entities = self._tracker._entities
        dataset = entities.Dataset(
            name=name, digest=sha256[:36], source_type="local", source=redact(source)
        )
        context_tag = entities.InputTag(key="mlflow.data.context", value=context)
        given = entities.DatasetInput(dataset=dataset, tags=[context_tag])
        self._put("dataset", lambda c, r: c.log_inputs(r, datasets=[given]))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a local file into the run's artifacts (read when it is sent)."""
        self._put(f"artifact {path}", lambda c, r: c.log_artifact(r, str(path), folder))

    def log_text(self, text: str, name: str) -> None:
        """A text artifact, for example ``table.csv``."""
        self._put(f"artifact {name}", lambda c, r: c.log_text(r, text, name))

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED`` after what was logged before."""
        self._release()
        self._put("status", lambda c, r: c.set_terminated(r, status))

    def flush(self) -> None:
        """Wait until everything so far is written or given up."""
        self._release()
        if self._sender is not None:
            self._sender.flush()


def _shown(value: Any) -> str:
    return redact(str(value))[:_MAX_VALUE_LENGTH]
