"""MLflow, thinly: runs that survive retries, a server that goes away, and kills.

The only module that imports MLflow. A command opens its store before it works, and is refused where
that fails. From then on nothing about a store is an error: every write goes through one background
thread that tries again with growing pauses, so that a scan or a training step never waits for a
tracking server, and a server that comes back before the work ends has lost nothing. A run is found
again by its key (a tag), so a resumed command or a retried trial continues its run instead of
starting another. Runs whose process died without a word are closed as KILLED the next time anything
is logged beside them.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

from ke_ray.errors import StorageError
from ke_ray.results.manifest import versions
from ke_ray.secrets import redact
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.run import NoRun, TrackedRun
from ke_ray.tracking.sender import Sender, outage_of

log = logging.getLogger(__name__)

T = TypeVar("T")

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


def store_uri(settings: TrackingSettings) -> str:
    """The store that a study logs to: its own, ``MLFLOW_TRACKING_URI``, or a local database."""
    return (
        settings.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or "sqlite:///" + str(Path("mlflow.db").absolute())
    )


def check_store(settings: TrackingSettings) -> None:
    """Open a study's store, and create what is missing of it, before the work begins.

    Raises:
        StorageError: the store cannot be reached or created.
    """
    open_tracker(settings).close()


def open_tracker(settings: TrackingSettings, *, deferred: bool = False) -> Tracker:
    """A study's tracker: one that does nothing where ``settings.enabled`` is off.

    Raises:
        StorageError: the store cannot be reached or created (never where ``deferred``).
    """
    return Tracker(settings, deferred=deferred) if settings.enabled else NoTracker()


class Tracker:
    """One experiment of one MLflow store.

    Args:
        settings: the study's ``mlflow`` group; see :func:`store_uri`.
        deferred: open the store with the first write, in the background: for work that has started
            and must not fail. Runs get their id then.

    Raises:
        StorageError: the store cannot be reached or created (never where ``deferred``).
    """

    enabled = True

    def __init__(self, settings: TrackingSettings, *, deferred: bool = False) -> None:
        self.settings = settings
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow's own retries would hold one write for minutes; ours are bounded and visible.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.uri = store_uri(settings)
        if redact(self.uri) != self.uri:
            # MLflow prints a run's address when it ends, with the password that stands in it.
            os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "ke_ray")
        import mlflow  # noqa: F401  (seconds, which the first write need not wait for)

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._is_deferred = deferred
        if not deferred:
            with self._explained():
                _ = self.experiment_id
        self._sender = Sender(outage_of(self.uri))
        self._sender.start()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            raise StorageError(
                f"The MLflow store '{redact(self.uri)}' cannot be used: {redact(reason)}. Start "
                "it, set MLFLOW_TRACKING_URI, or switch it off with --no-mlflow."
            ) from error

    @cached_property
    def client(self) -> Any:
        """MLflow's client of the store; a local database is created."""
        from mlflow.tracking import MlflowClient

        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(self.uri)

    @cached_property
    def experiment_id(self) -> str:
        """The experiment, created where there is none; runs of dead processes are closed."""
        experiment_id = self._experiment_id()
        self._close_dead_runs(experiment_id)
        return experiment_id

    def _experiment_id(self) -> str:
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self.uri.startswith("sqlite:///"):
            # Absolute: the default would land in the working folder of whoever logs first.
            database = Path(self.uri.removeprefix("sqlite:///")).absolute()
            location = (database.parent / "mlartifacts").as_uri()
        try:
            # Recent servers sort experiments into training and GenAI by this tag.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(self.experiment, location, kind))
        except Exception:  # another process may have created it in the meantime
            experiment = self.client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise
            return str(experiment.experiment_id)

    def _close_dead_runs(self, experiment_id: str) -> None:
        for run in self.client.search_runs(
            [experiment_id],
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

        Raises:
            StorageError: the store went away since it was opened (never where deferred).

        Args:
            name: shown in the UI.
            key: identifies the run over restarts (for example the output folder).
            kind: ``scan``, ``pretrain``, ``continual``, ``sweep`` or ``trial``; a tag.
            params: nested; logged flat with dotted names.
            tags: added to the study's and to ke_ray's own.
            parent_id: makes it a child run.
        """
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

        def open_run() -> tuple[str, set[str]]:
            existing = self._run_with(digest)
            if existing is None:
                new = self.client.create_run(self.experiment_id, tags=every_tag, run_name=name)
                return str(new.info.run_id), set()
            self.client.update_run(existing.info.run_id, status="RUNNING")
            return str(existing.info.run_id), set(existing.data.params)

        run = TrackedRun(self._sender, lambda: self.client, open_run)
        if not self._is_deferred:
            with self._explained():
                run.open()
        run.set_tags(every_tag)
        run.log_params(flatten(params or {}), only_new=True)
        return run

    def _run_with(self, digest: str) -> Any:
        runs = self.client.search_runs(
            [self.experiment_id], filter_string=f"tags.`ke_ray.key` = '{digest}'", max_results=1
        )
        return runs[0] if runs else None

    def _ask(self, read: Callable[[], T], default: T) -> T:
        """What the store answers; ``default`` where it does not, or has just not answered."""
        if self._sender.outage.is_fresh:
            return default
        started = time.monotonic()
        try:
            return read()
        except Exception as error:
            self._sender.outage.failed(error, started)
            return default

    def find_run(self, key: str) -> str | None:
        """The id of the run with this key; None where there is none, or no answer."""
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        run = self._ask(lambda: self._run_with(digest), None)
        return None if run is None else str(run.info.run_id)

    def close_children(
        self, parent_id: str | None, statuses: Mapping[str, str] | None = None
    ) -> int:
        """Close children of a run that are still RUNNING, once none of them can be.

        Args:
            statuses: by run id, of those whose end is known but did not reach the store (a later
                command may have taken them for KILLED); the others become KILLED.

        Returns:
            how many were closed; 0 where the store does not answer.
        """
        if parent_id is None:
            return 0

        def close() -> int:
            num_closed = 0
            for run in self.client.search_runs(
                [self.experiment_id],
                filter_string="attributes.status != 'FINISHED' and "
                f"tags.`mlflow.parentRunId` = '{parent_id}'",
                max_results=5000,
            ):
                status = (statuses or {}).get(run.info.run_id, "KILLED")
                if run.info.status in {"RUNNING", "KILLED"} - {status}:
                    self.client.set_terminated(run.info.run_id, status)
                    num_closed += 1
            return num_closed

        return self._ask(close, 0)

    def compare_page(self, run_ids: Sequence[str]) -> str:
        """Where the UI compares these runs, seen from the server's own address."""
        runs, experiments = (
            quote(json.dumps(ids)) for ids in (list(run_ids), [self.experiment_id])
        )
        # Without the last part a newcomer's browser opens MLflow's pages for GenAI.
        return f"#/compare-runs?runs={runs}&experiments={experiments}{_TRAINING}"

    def run(self, run_id: str | None) -> TrackedRun:
        """A run by its id, to add to it; one that does nothing where the id is None."""
        if run_id is None:
            return NoRun()
        return TrackedRun(self._sender, lambda: self.client, run_id)

    def close(self) -> list[str]:
        """Wait until all is written; returns what had to be given up."""
        if self._sender.is_alive():
            self._sender.stop()
            if self._sender.lost:
                log.warning(
                    "MLflow: %d writes did not get through; the result folder has all values.",
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


class NoTracker(Tracker):
    """A tracker without a store: its runs log nothing."""

    enabled = False

    def __init__(self) -> None:
        pass

    def start_run(self, name: str, **_: Any) -> TrackedRun:
        return NoRun()

    def run(self, run_id: str | None) -> TrackedRun:
        return NoRun()

    def _ask(self, read: Callable[[], T], default: T) -> T:
        return default

    def close(self) -> list[str]:
        return []


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
