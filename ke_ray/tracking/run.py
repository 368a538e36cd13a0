"""One MLflow run as the rest of the package sees it: what is logged goes to the sender's queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ke_ray.secrets import redact
from ke_ray.tracking.sender import Sender

_MAX_VALUE_LENGTH = 5000


class TrackedRun:
    """One MLflow run; all methods but ``flush`` return at once.

    Args:
        sender: sends the writes.
        client: gives MLflow's client; called on the sender's thread.
        run: the run's id, or a function that finds or creates the run before the first write is
            sent, and returns its id and the parameters that it has.

    Attributes:
        run_id: None until the run is open.
    """

    run_id: str | None = None

    def __init__(
        self,
        sender: Sender,
        client: Callable[[], Any],
        run: str | Callable[[], tuple[str, set[str]]],
    ) -> None:
        self._sender, self._client = sender, client
        self._known_params: set[str] = set()
        self._waiting: list[tuple[str, float, int, int]] = []  # metrics that wait for others
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

    def _put_batches(self, what: str, kind: str, rows: Sequence[Sequence[Any]], size: int) -> None:
        """Write rows as MLflow's entities of one kind, ``size`` in a request."""

        def write(client: Any, run_id: str) -> None:
            items = [getattr(_entities(), kind)(*row) for row in rows]
            for start in range(0, len(items), size):
                client.log_batch(run_id, **{what: items[start : start + size]})

        if rows:
            self._put(what, write)

    def log_params(self, params: Mapping[str, Any], *, only_new: bool = False) -> None:
        """Flat parameters; long values are cut.

        With ``only_new`` those that a resumed run has stay: MLflow refuses to change one.
        """
        texts = {name: _shown(value) for name, value in params.items()}

        def write(client: Any, run_id: str) -> None:
            known = self._known_params if only_new else set()
            new = [_entities().Param(*item) for item in texts.items() if item[0] not in known]
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
        stamp = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        self._waiting += [
            (name, float(value), stamp, int(step))
            for name, value in metrics.items()
            if value is not None and abs(float(value)) < float("inf")
        ]
        if time.monotonic() - self._released >= hold_s:
            self._release()

    def _release(self) -> None:
        rows, self._waiting = self._waiting, []
        self._released = time.monotonic()
        self._put_batches("metrics", "Metric", rows, 1000)

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._put_batches("tags", "RunTag", [(k, _shown(v)) for k, v in tags.items()], 100)

    def log_dataset(self, name: str, sha256: str, source: str, context: str) -> None:
        """A dataset with its fingerprint (MLflow shows the first 36 characters)."""

        def write(client: Any, run_id: str) -> None:
            entities = _entities()
            dataset = entities.Dataset(
                name=name, digest=sha256[:36], source_type="local", source=redact(source)
            )
            tags = [entities.InputTag(key="mlflow.data.context", value=context)]
            client.log_inputs(run_id, datasets=[entities.DatasetInput(dataset=dataset, tags=tags)])

        self._put("dataset", write)

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
        self._sender.flush()


class NoRun(TrackedRun):
    """A run that logs nothing."""

    def __init__(self) -> None:
        self._waiting, self._released = [], float("-inf")

    def _put(self, what: str, write: Callable[[Any, str], None]) -> None:
        pass

    def flush(self) -> None:
        pass


def _entities() -> Any:
    from mlflow import entities  # takes seconds; whoever opened the store has imported it

    return entities


def _shown(value: Any) -> str:
    return redact(str(value))[:_MAX_VALUE_LENGTH]
