"""MLflow, thinly: runs that survive retries, a server that goes away, and kills.

The only module that imports MLflow. Every write goes through one background thread that tries
again with growing pauses, so that a scan or a training step never waits for a tracking server and
a server that is gone for half a minute loses nothing. A run is found again by its key (a tag), so
a resumed command or a retried trial continues its run instead of starting another. Runs whose
process died without a word are closed as KILLED the next time anything is logged beside them.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from ke_ray.errors import StorageError
from ke_ray.results.manifest import versions
from ke_ray.secrets import redact
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.sender import Sender

__all__ = ["TrackedRun", "Tracker", "flatten"]

log = logging.getLogger(__name__)

_MAX_VALUE_LENGTH = 5000
_TRAINING = "&workflowType=machine_learning"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted names: ``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is not None:
            flat[name] = value
    return flat


class Tracker:
    """One experiment of one MLflow store.

    Args:
        settings: the study's ``mlflow`` group.
        default_uri: used where neither the study nor ``MLFLOW_TRACKING_URI`` names a store;
            default ``sqlite:///mlflow.db`` in the working folder, as MLflow itself does.

    Raises:
        StorageError: the store cannot be reached or created.
    """

    def __init__(self, settings: TrackingSettings, default_uri: str | None = None) -> None:
        self.enabled = settings.enabled
        self.settings = settings
        self._sender: Sender | None = None
        if not self.enabled:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own retries would hold one write for minutes; ours are bounded and visible.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.uri = (
            settings.uri
            or os.environ.get("MLFLOW_TRACKING_URI")
            or default_uri
            or "sqlite:///" + str(Path("mlflow.db").absolute())
        )
        if redact(self.uri) != self.uri:
            # MLflow prints a run's address when it ends, with the password that stands in it.
            os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "ke_ray")
        import mlflow
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._entities = mlflow.entities
        try:
            if self.uri.startswith("sqlite:///"):
                Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            self.client = MlflowClient(self.uri)
            self.experiment_id = self._experiment_id()
            self._close_dead_runs()
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise StorageError(
                f"The MLflow store '{redact(self.uri)}' cannot be used: {redact(reason)}. Start "
                "it, set MLFLOW_TRACKING_URI, or switch it off with --no-mlflow."
            ) from error
        self._sender = Sender()
        self._sender.start()

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        location = None
        if self.uri.startswith("sqlite:///"):
            # Absolute: the default would land in the working folder of whoever logs first.
            database = Path(self.uri.removeprefix("sqlite:///")).absolute()
            location = (database.parent / "mlartifacts").as_uri()
        try:
            # Recent servers sort experiments into training and GenAI by this tag.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            made = self.client.create_experiment(self.experiment, location, kind)
            return str(made)
        except Exception:
            again = self.client.get_experiment_by_name(self.experiment)
            if again is None:
                raise
            return str(again.experiment_id)

    def _close_dead_runs(self) -> None:
        for run in self.client.search_runs(
            [self.experiment_id],
            filter_string=f"attributes.status = 'RUNNING' and tags.`ke_ray.host` = '{_host()}'",
            max_results=500,
        ):
            pid = run.data.tags.get("ke_ray.pid", "")
            if pid.isdigit() and not _alive(int(pid)):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def start_run(
        self,
        name: str,
        *,
        key: str,
        kind: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        parent_id: str | None = None,
    ) -> TrackedRun:
        """Start a run, or continue the one with this key.

        Args:
            name: shown in the UI.
            key: identifies the run over restarts (for example the output folder).
            kind: ``scan``, ``pretrain``, ``continual``, ``sweep`` or ``trial``; a tag.
            params: nested; logged flat with dotted names.
            tags: added to the study's and to ke_ray's own.
            parent_id: makes it a child run.
        """
        if not self.enabled or self._sender is None:
            return TrackedRun(None, None, None)
        # A digest, since MLflow's filter language has no escape for quotes in a path.
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        own = {
            "ke_ray.key": digest,
            "ke_ray.kind": kind,
            "ke_ray.host": _host(),
            "ke_ray.pid": str(os.getpid()),
            "ke_ray.version": versions()["ke_ray"],
            # What MLflow's own way to start a run sets, and its table of runs shows.
            "mlflow.source.name": f"ke-ray {kind}",
            "mlflow.source.type": "LOCAL",
        }
        with suppress(OSError, KeyError):  # a container's user may have no name
            own["mlflow.user"] = getpass.getuser()
        if parent_id:
            own["mlflow.parentRunId"] = parent_id
        every_tag = {**self.settings.tags, **(tags or {}), **own}
        found = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.`ke_ray.key` = '{digest}'", max_results=1
        )
        if found:
            run_id = str(found[0].info.run_id)
            self.client.update_run(run_id, status="RUNNING")
            known = set(found[0].data.params)
        else:
            created = self.client.create_run(self.experiment_id, tags=every_tag, run_name=name)
            run_id, known = str(created.info.run_id), set()
        run = TrackedRun(run_id, self, self._sender)
        run.set_tags(every_tag)
        # A parameter cannot be changed once logged; a resumed run has the same ones anyway.
        run.log_params({k: v for k, v in flatten(params or {}).items() if k not in known})
        return run

    def find_run(self, key: str) -> str | None:
        """The id of the run with this key, if there is one."""
        if not self.enabled:
            return None
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        found = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.`ke_ray.key` = '{digest}'", max_results=1
        )
        return str(found[0].info.run_id) if found else None

    def close_children(self, parent_id: str | None, status: str = "KILLED") -> int:
        """Close children of a run that are still RUNNING, once none of them can be.

        Returns:
            how many there were.
        """
        if not self.enabled or parent_id is None:
            return 0
        left = self.client.search_runs(
            [self.experiment_id],
            filter_string="attributes.status = 'RUNNING' and "
            f"tags.`mlflow.parentRunId` = '{parent_id}'",
            max_results=500,
        )
        for run in left:
            self.client.set_terminated(run.info.run_id, status)
        return len(left)

    def compare_page(self, run_ids: Sequence[str]) -> str:
        """Where the UI compares these runs, seen from the server's own address."""
        runs, experiments = (
            quote(json.dumps(ids)) for ids in (list(run_ids), [self.experiment_id])
        )
        # Without the last part a newcomer's browser opens MLflow's pages for GenAI.
        return f"#/compare-runs?runs={runs}&experiments={experiments}{_TRAINING}"

    def run(self, run_id: str | None) -> TrackedRun:
        """A run by its id, to add to it; one that does nothing where the id is None."""
        return TrackedRun(run_id, self if self.enabled else None, self._sender)

    def close(self) -> list[str]:
        """Wait until all is written; returns what had to be given up."""
        if self._sender is None:
            return []
        if self._sender.is_alive():
            self._sender.stop()
            if self._sender.lost:
                log.warning(
                    "MLflow: %d writes were lost; the result folder has all values.",
                    len(self._sender.lost),
                )
        return self._sender.lost

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class TrackedRun:
    """One MLflow run; all methods return at once. Without a tracker they do nothing."""

    def __init__(self, run_id: str | None, tracker: Tracker | None, sender: Sender | None) -> None:
        self.run_id = run_id
        self._tracker = tracker
        self._sender = sender
        self._held: list[Any] = []  # metrics that wait for others
        self._released = float("-inf")

    def _put(self, what: str, write: Callable[[Any, str], None]) -> None:
        if self._sender is None or self._tracker is None or self.run_id is None:
            return
        client, run_id = self._tracker.client, self.run_id
        self._sender.put(f"{what} of run {run_id}", lambda: write(client, run_id))

    def _put_batch(self, what: str, **batch: Any) -> None:
        self._put(what, lambda client, run_id: client.log_batch(run_id, **batch))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Flat parameters; long values are cut."""
        if self._tracker is None or not params:
            return
        entities = self._tracker._entities
        items = [entities.Param(k, _shown(v)) for k, v in params.items()]
        for start in range(0, len(items), 100):
            self._put_batch("parameters", params=items[start : start + 100])

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


def _host() -> str:
    return socket.gethostname().replace("'", "")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
