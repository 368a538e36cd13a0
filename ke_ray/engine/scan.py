"""The scan: entropies of many checkpoints on Ray Data.

Driver side. It lists checkpoints, packs the corpora, leaves out what the output folder already
has, deals work items to scorers (``ke_ray.engine.scorer``), merges partial sums in float64, and
writes each checkpoint's results as it finishes. Memory on the driver is that of the corpora and of
the checkpoints that are being scored, whatever the length of the series.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from ke_ray import storage
from ke_ray.engine.plan import CheckpointWork, plan_items
from ke_ray.engine.scan_setup import ScanSetup
from ke_ray.engine.scorer import (
    CheckpointScorer,
    ScanMonitor,
    ScorerSettings,
    evaluated_columns,
    item_to_json,
    sums_from_bytes,
)
from ke_ray.engine.session import (
    cluster_resources,
    most_cpus_of_a_node,
    ray_session,
    worker_env,
)
from ke_ray.errors import KeRayError, StorageError
from ke_ray.models.reference import CheckpointRef
from ke_ray.results.scan_folder import REPLICATES_SCHEMA
from ke_ray.tracking import TrackedRun, Tracker

__all__ = ["ScanOutcome", "ScanProgress", "run_scan"]

log = logging.getLogger(__name__)

_FOLD_EVERY_S = 15.0
_FOLD_SHARE = 0.05  # of the driver's time, at most


class ScanProgress(Protocol):
    """What a scan tells about itself while it runs."""

    def start(self, *, num_checkpoints: int, num_skipped: int, num_tokens: int) -> None:
        """Before the first item; tokens to score, padding included."""

    def tokens(self, num_tokens: int) -> None:
        """Tokens scored so far, about once a second."""

    def checkpoint(self, ref: CheckpointRef, rows: Sequence[dict[str, Any]]) -> None:
        """One checkpoint is done; its result rows, some of which may have failed."""

    def stop(self) -> None:
        """After the last item."""


@dataclass
class ScanOutcome:
    """What came of a scan.

    Attributes:
        scanned, skipped: checkpoints scored now, and found finished.
        failures: (checkpoint, message) of those that failed.
        phases_s: seconds of set-up, Ray start, scoring (actor start included) and closing.
        timings: seconds of fetch, load, score and wait, one entry per item.
    """

    output: str
    scanned: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    phases_s: dict[str, float] = field(default_factory=dict)
    timings: list[dict[str, float]] = field(default_factory=list)
    num_tokens: int = 0
    mlflow_run_id: str | None = None

    @property
    def exit_code(self) -> int:
        """1 where a checkpoint failed, else 0."""
        return 1 if self.failures else 0


@dataclass
class _Pending:
    """What has come back so far of one checkpoint."""

    work: CheckpointWork
    rows: list[dict[str, Any]] = field(default_factory=list)
    replicates: list[pa.Table] = field(default_factory=list)
    coefficients: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.work.corpora)


class _Collector:
    """Turns scorer output into result files."""

    def __init__(
        self,
        setup: ScanSetup,
        settings: ScorerSettings,
        run: TrackedRun,
        progress: ScanProgress,
        outcome: ScanOutcome,
    ) -> None:
        self._setup = setup
        self._settings = settings
        self._run = run
        self._progress = progress
        self._outcome = outcome
        self._pending = {work.index: _Pending(work) for work in setup.works}
        self._fold_after = time.monotonic() + _FOLD_EVERY_S

    def add(self, output: dict[str, Any]) -> None:
        """Take one row of ``OUTPUT_SCHEMA``."""
        index, corpus = output["checkpoint"], output["corpus"]
        pending = self._pending.get(index)
        if pending is None or corpus in pending.done:
            return  # the rest of a checkpoint that has failed already
        self._outcome.timings.append(
            {k: output[k] for k in ("fetch_s", "load_s", "score_s", "wait_s") if output[k]}
        )
        if output["status"] == "ok" and output["sums"] is not None:
            output = self._merge(pending, output)
        if output["status"] == "ok" and output["rows"] is None:
            return  # more pieces are to come
        pending.done.add(corpus)
        self._take(pending, output)
        if pending.is_done:
            self._finish(index, pending)

    def give_up(self, reason: str) -> None:
        """Record everything that has not come back as failed."""
        for index, pending in list(self._pending.items()):
            for work in pending.work.corpora:
                if work.corpus not in pending.done:
                    pending.done.add(work.corpus)
                    failed = {"corpus": work.corpus, "status": "failed", "error": reason}
                    self._take(pending, failed)
            self._finish(index, pending)

    def _merge(self, pending: _Pending, output: dict[str, Any]) -> dict[str, Any]:
        corpus = output["corpus"]
        part = sums_from_bytes(output["sums"])
        merged = pending.sums.get(corpus)
        merged = part if merged is None else merged.merge(part)
        pending.sums[corpus] = merged
        if not merged.is_complete():
            return output
        work = next(work for work in pending.work.corpora if work.corpus == corpus)
        del pending.sums[corpus]
        try:
            return {**output, **evaluated_columns(merged, work.measures, self._settings)}
        except KeRayError as error:
            return {**output, "status": "failed", "error": str(error)}

    def _take(self, pending: _Pending, output: dict[str, Any]) -> None:
        ref = self._setup.refs[pending.work.index]
        corpus = self._setup.corpora[output["corpus"]]
        common = {
            "checkpoint": ref.name,
            "step": ref.step,
            "revision": ref.revision,
            "corpus": corpus.name,
            "num_instances": output.get("num_instances"),
            "num_tokens": output.get("num_tokens"),
            "weights_sha256": output.get("weights_sha256"),
            "data_sha256": corpus.sha256,
            "status": output["status"],
            "error": output.get("error"),
        }
        if output["status"] != "ok":
            pending.rows.append(common)
            return
        pending.rows += [{**common, **row} for row in _from_ipc(output["rows"]).to_pylist()]
        replicates = _from_ipc(output["replicates"])
        size = replicates.num_rows
        for name, value, kind in (
            ("corpus", corpus.name, pa.string()),
            ("step", ref.step, pa.int64()),
            ("checkpoint", ref.name, pa.string()),
        ):
            column = pa.repeat(pa.scalar(value, kind), size)
            replicates = replicates.add_column(0, pa.field(name, kind), column)
        pending.replicates.append(replicates.cast(REPLICATES_SCHEMA))
        if output["coefficients"] is not None:
            from safetensors.numpy import load

            pending.coefficients[corpus.name] = load(output["coefficients"])[
                "mean_abs_coefficients"
            ]

    def _finish(self, index: int, pending: _Pending) -> None:
        del self._pending[index]
        ref = self._setup.refs[index]
        folder = self._setup.folder
        folder.write_part(
            ref.name,
            pending.rows,
            pa.concat_tables(pending.replicates) if pending.replicates else None,
            pending.coefficients,
        )
        errors = list(dict.fromkeys(r["error"] for r in pending.rows if r["status"] != "ok"))
        if errors:
            self._outcome.failures.append((ref.name, " ".join(errors)))
        else:
            self._outcome.scanned += 1
        self._outcome.num_tokens += sum(
            row["num_tokens"] or 0 for row in {row["corpus"]: row for row in pending.rows}.values()
        )
        log_scan_metrics(self._run, pending.rows, index, self._setup.study.data)
        self._progress.checkpoint(ref, pending.rows)
        # Folding reads and writes all tables again, which takes ever longer in a long series.
        if (started := time.monotonic()) > self._fold_after:
            folder.consolidate()
            ended = time.monotonic()
            self._fold_after = ended + max(_FOLD_EVERY_S, (ended - started) / _FOLD_SHARE)


def run_scan(setup: ScanSetup, progress: ScanProgress, tracker: Tracker) -> ScanOutcome:
    """Score what is missing and write it.

    Args:
        setup: from ``prepare_scan``.
        progress: told what happens.
        tracker: where the run is logged.

    Returns:
        What was done; failed checkpoints are in it and in the results, never raised.

    Raises:
        StorageError: the output folder cannot be written (what was finished before is kept).
    """
    study, folder = setup.study, setup.folder
    outcome = ScanOutcome(study.output, skipped=setup.num_skipped)
    outcome.phases_s["setup"] = setup.duration_s
    folder.manifest.update(status="running")
    if setup.changed:
        log.warning("Other weights than before, scanned anew: %s", ", ".join(setup.changed))
    folder.consolidate(without=setup.changed)
    run = _start_run(setup, tracker)
    outcome.mlflow_run_id = run.run_id
    num_tokens = sum(work.num_tokens for work in setup.works)
    progress.start(
        num_checkpoints=len(setup.works), num_skipped=setup.num_skipped, num_tokens=num_tokens
    )
    status = "KILLED"
    try:
        if setup.works:
            started = time.monotonic()
            with ray_session():
                outcome.phases_s["ray_start"] = time.monotonic() - started
                started = time.monotonic()
                _score(setup, run, progress, outcome)
                outcome.phases_s["scoring"] = time.monotonic() - started
        started = time.monotonic()
        folder.manifest["checkpoints"] = setup.checkpoint_entries()
        folder.consolidate(final=not outcome.failures)
        if outcome.failures:
            folder.manifest["status"] = "failed"
            folder.write_manifest()
        outcome.phases_s["closing"] = time.monotonic() - started
        status = "FAILED" if outcome.failures else "FINISHED"
    except StorageError:
        status = "FAILED"
        raise
    finally:
        progress.stop()
        if status == "KILLED":
            # Interrupted: the finished parts stay, and the same command goes on from them.
            folder.manifest["status"] = "interrupted"
            folder.write_manifest()
        else:
            run.set_tags({"ke_ray.num_failed": str(len(outcome.failures))})
        run.finish(status)
    return outcome


def _score(setup: ScanSetup, run: TrackedRun, progress: ScanProgress, outcome: ScanOutcome) -> None:
    import ray

    study = setup.study
    num_actors, per_actor = _actors(setup)
    items = plan_items(setup.works, num_actors)
    num_actors = min(num_actors, len(items))
    settings = ScorerSettings(
        dtype=study.dtype,
        batch_size=study.batch_size,
        top_k_fraction=study.top_k_fraction,
        dormant_threshold=study.dormant_threshold,
        threads=int(per_actor.get("num_cpus", 1)) if "num_gpus" not in per_actor else None,
        cache_dir=_absolute(study.cache_dir) if study.cache_dir else None,
        cache_bytes=study.cache_bytes,
        resuscitation=study.resuscitation,
    )
    monitor = ray.remote(num_cpus=0, max_restarts=0)(ScanMonitor).remote()
    arrays = {
        name: ray.put((corpus.input_ids, corpus.lengths)) for name, corpus in setup.corpora.items()
    }
    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # One block per item, so that Ray Data schedules and retries exactly our items. It restarts
    # actors and retries items without end; the scorer gives an item up after MAX_ATTEMPTS.
    dataset = ray.data.from_arrow([pa.table({"item": [item_to_json(item)]}) for item in items])
    dataset = dataset.map_batches(
        CheckpointScorer,
        fn_constructor_kwargs={
            "settings": settings,
            # A cluster that was joined runs its workers in a folder of its own.
            "checkpoints": [
                replace(ref, location=_absolute(ref.location)) if ref.is_local else ref
                for ref in setup.refs
            ],
            "corpora": arrays,
            "monitor": monitor,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=num_actors,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        runtime_env={"env_vars": worker_env(settings.threads)},
        **per_actor,
    )
    collector = _Collector(setup, settings, run, progress, outcome)
    with _ticking(monitor, progress):
        try:
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for output in batch.to_pylist():
                    collector.add(output)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            log.exception("Ray ended the scan")
            collector.give_up(f"Ray ended the scan before this checkpoint was scored: {reason}")
        else:
            collector.give_up("Ray returned only a part of this checkpoint's results; run again.")


def _actors(setup: ScanSetup) -> tuple[int, dict[str, float]]:
    """How many scorers, and the resources of each.

    One per GPU where there are any. On CPUs as many as asked for, else one per core, fewer where
    memory could not hold two models for each.
    """
    resources = cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    asked = setup.study.num_actors
    if num_gpus:
        return min(asked or num_gpus, num_gpus), {"num_gpus": 1, "num_cpus": 1}
    num_actors = min(asked or num_cpus, num_cpus)
    if asked is None:
        largest = max((ref.size_bytes or 0 for ref in setup.refs), default=0)
        if largest:
            num_actors = max(1, min(num_actors, int(resources.get("memory", 0) / (2.5 * largest))))
        num_actors = min(num_actors, max(1, len(setup.works)))
    # An actor lives on one node: more cores than the largest has would never be granted.
    return num_actors, {"num_cpus": max(1, min(num_cpus // num_actors, most_cpus_of_a_node()))}


@contextmanager
def _ticking(monitor: Any, progress: ScanProgress) -> Iterator[None]:
    """Ask the monitor for the tokens scored, once a second, on a thread."""
    import ray

    stopped = threading.Event()

    def tick() -> None:
        while not stopped.wait(1.0):
            try:
                progress.tokens(ray.get(monitor.tokens.remote(), timeout=5))
            except ray.exceptions.RayError:
                continue

    thread = threading.Thread(target=tick, name="scan-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=10)
    with suppress(ray.exceptions.RayError):
        progress.tokens(ray.get(monitor.tokens.remote(), timeout=5))


def _from_ipc(payload: bytes) -> pa.Table:
    with pa.ipc.open_stream(io.BytesIO(payload)) as reader:
        return reader.read_all()


def _absolute(uri: str) -> str:
    """A local path as any process of the node finds it; other URIs as they are."""
    return str(storage.local_path(uri).absolute()) if storage.is_local(uri) else uri


def _start_run(setup: ScanSetup, tracker: Tracker) -> TrackedRun:
    study = setup.study
    name = study.name or study.output.rstrip("/").rsplit("/", 1)[-1]
    run = tracker.start_run(
        name,
        # Absolute: one tracking server may serve many working folders with a runs/scan each.
        key=f"scan:{_absolute(study.output)}",
        kind="scan",
        params=study.model_dump(exclude={"mlflow", "output"}),
        tags={"ke_ray.output": study.output}
        | {f"data_sha256.{name}": c.sha256 for name, c in setup.corpora.items()},
    )
    for corpus in setup.corpora.values():
        run.log_dataset(corpus.name, corpus.sha256, corpus.source, "scan")
    return run


def log_scan_metrics(
    run: TrackedRun, rows: Sequence[dict[str, Any]], index: int, corpora: Any
) -> None:
    """Log one checkpoint's values at step = pretraining step (its index where it has none)."""
    metrics: dict[str, float] = {}
    step = index
    for row in rows:
        if row["status"] != "ok":
            continue
        step = index if row["step"] is None else row["step"]
        place = "total" if row["layer"] is None else f"layer_{row['layer']:02d}"
        corpus = f"/{row['corpus']}" if len(corpora) > 1 else ""
        metrics[f"{row['measure']}{corpus}/{place}_{row['unit']}"] = row["value"]
    if metrics:
        run.log_metrics(metrics, step)
        name = next(row["checkpoint"] for row in rows if row["status"] == "ok")
        sha256 = next((r["weights_sha256"] for r in rows if r.get("weights_sha256")), None)
        if sha256:
            run.set_tags({f"weights_sha256.{name}": sha256})
