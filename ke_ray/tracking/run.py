"""One MLflow run as the rest of the package sees it: what is logged goes to the sender's queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ke_ray.secrets import redact
from ke_ray.tracking.sender import Sender

_MAX_VALUE_LENGTH = 5000


class TrackedRun:
    """A run that logs nothing; :class:`MlflowRun` is one that does.

    Attributes:
        run_id: the id in the store; None where there is none, or not yet.
    """

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any], *, only_new: bool = False) -> None:
        """Flat parameters; long values are cut.

        With ``only_new`` those that a resumed run has stay: MLflow refuses to change one.
        """

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

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_dataset(self, name: str, sha256: str, source: str, context: str) -> None:
        """A dataset with its fingerprint (MLflow shows the first 36 characters)."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a local file into the run's artifacts (read when it is sent)."""

    def log_text(self, text: str, name: str) -> None:
        """A text artifact, for example ``table.csv``."""

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED`` after what was logged before."""

    def flush(self) -> None:
        """Wait until everything so far is written or given up."""


class MlflowRun(TrackedRun):
    """A run of a store; all methods but ``flush`` return at once.

    Args:
        sender: sends the writes.
        client: gives MLflow's client; called on the sender's thread.
        run: the run's id, or a function that finds or creates the run before the first write is
            sent and returns its id and the parameters that it has.
    """

    def __init__(
        self,
        sender: Sender,
        client: Callable[[], Any],
        run: str | Callable[[], tuple[str, set[str]]],
    ) -> None:
        # mlflow takes seconds to import; whoever made the sender has imported it.
        from mlflow import entities

        self._entities: Any = entities
        self._sender, self._client = sender, client
        self._known_params: set[str] = set()
        self._waiting: list[Any] = []  # metrics that wait for others
        self._released = float("-inf")
        if isinstance(run, str):
            self.run_id = run
        else:
            self._find_or_create = run

    def open(self) -> str:
        """Find or create the run in the store; its id. Raises whatever MLflow does."""
        if self.run_id is None:
            self.run_id, self._known_params = self._find_or_create()
        return self.run_id

    def _put(self, what: str, write: Callable[[Any, str], None]) -> None:
        self._sender.put(f"the run's {what}", lambda: write(self._client(), self.open()))

    def _put_batches(self, kind: str, items: list[Any], size: int) -> None:
        for start in range(0, len(items), size):
            self._put_batch(kind, items[start : start + size])

    def _put_batch(self, kind: str, batch: list[Any]) -> None:
        self._put(kind, lambda client, run_id: client.log_batch(run_id, **{kind: batch}))

    def log_params(self, params: Mapping[str, Any], *, only_new: bool = False) -> None:
        items = [self._entities.Param(k, _shown(v)) for k, v in params.items()]

        def write(client: Any, run_id: str) -> None:
            new = [item for item in items if not (only_new and item.key in self._known_params)]
            for start in range(0, len(new), 100):
                client.log_batch(run_id, params=new[start : start + 100])

        if items:
            self._put("parameters", write)

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        timestamp_ms: int | None = None,
        *,
        hold_s: float = 0.0,
    ) -> None:
        stamp = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        self._waiting += [
            self._entities.Metric(name, float(value), stamp, int(step))
            for name, value in metrics.items()
            if value is not None and abs(float(value)) < float("inf")
        ]
        if time.monotonic() - self._released >= hold_s:
            self._release()

    def _release(self) -> None:
        items, self._waiting = self._waiting, []
        self._released = time.monotonic()
        self._put_batches("metrics", items, 1000)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        items = [self._entities.RunTag(k, _shown(v)) for k, v in tags.items()]
        self._put_batches("tags", items, 100)

    def log_dataset(self, name: str, sha256: str, source: str, context: str) -> None:
        entities = self._entities
        dataset = entities.Dataset(
            name=name, digest=sha256[:36], source_type="local", source=redact(source)
        )
        context_tag = entities.InputTag(key="mlflow.data.context", value=context)
        inputs = [entities.DatasetInput(dataset=dataset, tags=[context_tag])]
        self._put("dataset", lambda client, run_id: client.log_inputs(run_id, datasets=inputs))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        self._put(f"artifact {path}", lambda c, r: c.log_artifact(r, str(path), folder))

    def log_text(self, text: str, name: str) -> None:
        self._put(f"artifact {name}", lambda c, r: c.log_text(r, text, name))

    def finish(self, status: str = "FINISHED") -> None:
        self._release()
        self._put("status", lambda c, r: c.set_terminated(r, status))

    def flush(self) -> None:
        self._release()
        self._sender.flush()


def _shown(value: Any) -> str:
    return redact(str(value))[:_MAX_VALUE_LENGTH]
