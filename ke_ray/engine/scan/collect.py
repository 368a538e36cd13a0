"""The collector of a scan, which turns what the scorers return into result files.

Partial sums are merged in float64; a checkpoint is written when all of it is there. Threads of
its own write and fold, which may wait for a store, so that results are taken as fast as they come.
"""

from __future__ import annotations

import io
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pyarrow as pa
from safetensors.numpy import load

from ke_ray.checkpoints.reference import position
from ke_ray.engine.cluster.metrics import ScanMeter
from ke_ray.errors import KeRayError, StoreOutageError
from ke_ray.outcomes import ScanOutcome
from ke_ray.planning.scan import ScanSetup
from ke_ray.planning.scan_items import CheckpointWork
from ke_ray.planning.scan_messages import (
    OUTAGE,
    ScorerSettings,
    evaluated_columns,
    sums_from_bytes,
)
from ke_ray.planning.scan_rows import labelled
from ke_ray.planning.scan_tracking import log_scan_metrics
from ke_ray.results.scan_folder import EXPERTS_SCHEMA, REPLICATES_SCHEMA
from ke_ray.resuscitation.prediction import write_record
from ke_ray.tracking.run import TrackedRun

log = logging.getLogger(__name__)

_FOLD_EVERY_S = 15.0
_FOLD_SHARE = 0.05  # of the driver's time, at most
_WRITERS = 8
_MAX_WAITING = 4 * _WRITERS  # finished checkpoints in memory


@dataclass
class _Pending:
    """What has come back so far of one checkpoint."""

    work: CheckpointWork
    rows: list[dict[str, Any]] = field(default_factory=list)
    replicates: list[pa.Table] = field(default_factory=list)
    experts: list[pa.Table] = field(default_factory=list)
    coefficients: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    covered: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def cover(self, corpus: str, start: int, stop: int) -> bool:
        """Note instances of a corpus as scored; False where some of them were before."""
        covered = self.covered.setdefault(corpus, [])
        if any(start < last and first < stop for first, last in covered):
            return False
        covered.append((start, stop))
        return True

    @property
    def is_done(self) -> bool:
        return len(self.done) == len(self.work.corpora)


class Collector:
    """Turns scorer output into result files; leaving its block waits until they are written.

    A failure to write is raised by the next ``add``, or in the end.
    """

    def __init__(
        self,
        setup: ScanSetup,
        settings: ScorerSettings,
        run: TrackedRun,
        meter: ScanMeter,
        outcome: ScanOutcome,
    ) -> None:
        self._setup = setup
        self._settings = settings
        self._run = run
        self._meter = meter
        self._outcome = outcome
        self._pending = {work.index: _Pending(work) for work in setup.works}
        self._fold_after = time.monotonic() + _FOLD_EVERY_S
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="scan-writer")
        self._writes: deque[Future[None]] = deque()
        self._lock = threading.Lock()  # of outcome, run and meter
        self._fold_lock = threading.Lock()

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._fold_after = math.inf  # the folder may be another command's by now
        self._writers.shutdown(cancel_futures=isinstance(error, KeyboardInterrupt))
        if error is None:
            self._settle(0)

    @property
    def is_done(self) -> bool:
        """Whether all of every checkpoint is there."""
        return not self._pending

    def add(self, output: dict[str, Any]) -> None:
        """Take one row of ``OUTPUT_SCHEMA``.

        Raises:
            StoreOutageError: a scorer has waited for its store in vain. The checkpoint is neither
                done nor failed, and the same command scores it.
        """
        self._settle(_MAX_WAITING)
        if output["status"] == OUTAGE:
            raise StoreOutageError(output["error"])
        index, corpus = output["checkpoint"], output["corpus"]
        pending = self._pending.get(index)
        if pending is None or corpus in pending.done:
            return  # the rest of a checkpoint that has failed already
        timing = {k: output[k] for k in ("fetch_s", "load_s", "score_s", "wait_s") if output[k]}
        if timing:
            self._outcome.timings.append(timing)
            shown = ", ".join(f"{name} {value:.1f}" for name, value in timing.items())
            log.info("%s: %s", self._setup.refs[index].name, shown)
        if "load_s" in timing:
            with self._lock:
                self._meter.loaded(self._setup.refs[index].size_bytes or 0)
        if record := output.get("resuscitation"):
            write_record(self._setup.study.output, self._setup.refs[index].name, record)
        if output["status"] == "ok" and not pending.cover(corpus, output["start"], output["stop"]):
            return  # dealt anew, since its scorer was taken for lost
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
            **position(ref),
            "revision": ref.revision,
            "corpus": corpus.name,
            "num_instances": output.get("num_instances"),
            "num_tokens": output.get("num_tokens"),
            "weights_sha256": output.get("weights_sha256"),
            "series": output.get("series"),
            "n_layers": output.get("n_layers"),
            "data_sha256": corpus.sha256,
            "status": output["status"],
            "error": output.get("error"),
        }
        if output["status"] != "ok":
            pending.rows.append(common)
            return
        pending.rows += [{**common, **row} for row in _from_ipc(output["rows"]).to_pylist()]
        for payload, tables, columns in (
            (output["replicates"], pending.replicates, REPLICATES_SCHEMA),
            (output.get("experts"), pending.experts, EXPERTS_SCHEMA),
        ):
            if payload is not None:
                tables.append(labelled(_from_ipc(payload), common, columns))
        if output["coefficients"] is not None:
            pending.coefficients[corpus.name] = load(output["coefficients"])[
                "mean_abs_coefficients"
            ]

    def _finish(self, index: int, pending: _Pending) -> None:
        del self._pending[index]
        self._writes.append(self._writers.submit(self._write, index, pending))

    def _settle(self, most: int) -> None:
        """Wait until at most ``most`` writes are under way; raise what went wrong in others."""
        while self._writes and (self._writes[0].done() or len(self._writes) > most):
            self._writes.popleft().result()

    def _write(self, index: int, pending: _Pending) -> None:
        """Write a finished checkpoint, and then say that it is done."""
        ref = self._setup.refs[index]
        folder = self._setup.folder
        folder.write_part(
            ref.name,
            pending.rows,
            pa.concat_tables(pending.replicates) if pending.replicates else None,
            pending.coefficients,
            pa.concat_tables(pending.experts) if pending.experts else None,
        )
        errors = list(dict.fromkeys(r["error"] for r in pending.rows if r["status"] != "ok"))
        tokens = {row["corpus"]: row["num_tokens"] or 0 for row in pending.rows}
        with self._lock:
            if errors:
                self._outcome.failures.append((ref.name, " ".join(errors)))
            else:
                self._outcome.num_done += 1
            self._outcome.num_tokens += sum(tokens.values())
            log_scan_metrics(self._run, pending.rows, index, self._setup)
            self._meter.ended(ref.name, pending.rows)
        # Folding reads and writes all tables again, which takes ever longer in a long series. Parts
        # that are written meanwhile stay for the next time.
        if time.monotonic() > self._fold_after and self._fold_lock.acquire(blocking=False):
            try:
                started = time.monotonic()
                folder.consolidate()
                ended = time.monotonic()
                self._fold_after = ended + max(_FOLD_EVERY_S, (ended - started) / _FOLD_SHARE)
            finally:
                self._fold_lock.release()


def _from_ipc(payload: bytes) -> pa.Table:
    with pa.ipc.open_stream(io.BytesIO(payload)) as reader:
        return reader.read_all()
