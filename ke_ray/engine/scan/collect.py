"""The collector of a scan, which turns what the scorers return into result files.

Partial sums are merged in float64; a checkpoint is written when all of it is there.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from safetensors.numpy import load

from ke_ray.checkpoints.reference import position
from ke_ray.engine.cluster.metrics import ScanMeter
from ke_ray.errors import KeRayError
from ke_ray.outcomes import ScanOutcome
from ke_ray.planning.scan import ScanSetup
from ke_ray.planning.scan_items import CheckpointWork
from ke_ray.planning.scan_messages import ScorerSettings, evaluated_columns, sums_from_bytes
from ke_ray.planning.scan_tracking import log_scan_metrics
from ke_ray.results.scan_folder import EXPERTS_SCHEMA, REPLICATES_SCHEMA
from ke_ray.resuscitation.prediction import write_record
from ke_ray.tracking.run import TrackedRun

_FOLD_EVERY_S = 15.0
_FOLD_SHARE = 0.05  # of the driver's time, at most


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
    """Turns scorer output into result files."""

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

    @property
    def is_done(self) -> bool:
        """Whether all of every checkpoint is there."""
        return not self._pending

    def add(self, output: dict[str, Any]) -> None:
        """Take one row of ``OUTPUT_SCHEMA``."""
        index, corpus = output["checkpoint"], output["corpus"]
        pending = self._pending.get(index)
        if pending is None or corpus in pending.done:
            return  # the rest of a checkpoint that has failed already
        timing = {k: output[k] for k in ("fetch_s", "load_s", "score_s", "wait_s") if output[k]}
        if timing:
            self._outcome.timings.append(timing)
        if "load_s" in timing:
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
                tables.append(_labelled(_from_ipc(payload), common, columns))
        if output["coefficients"] is not None:
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
            pa.concat_tables(pending.experts) if pending.experts else None,
        )
        errors = list(dict.fromkeys(r["error"] for r in pending.rows if r["status"] != "ok"))
        if errors:
            self._outcome.failures.append((ref.name, " ".join(errors)))
        else:
            self._outcome.num_done += 1
        self._outcome.num_tokens += sum(
            row["num_tokens"] or 0 for row in {row["corpus"]: row for row in pending.rows}.values()
        )
        log_scan_metrics(self._run, pending.rows, index, self._setup)
        self._meter.ended(ref.name, pending.rows)
        # Folding reads and writes all tables again, which takes ever longer in a long series.
        if (started := time.monotonic()) > self._fold_after:
            folder.consolidate()
            ended = time.monotonic()
            self._fold_after = ended + max(_FOLD_EVERY_S, (ended - started) / _FOLD_SHARE)


def _labelled(table: pa.Table, common: Mapping[str, Any], columns: pa.Schema) -> pa.Table:
    """The table with the columns that all of a checkpoint's rows have in common."""
    arrays = [
        table[column.name]
        if column.name in table.column_names
        else pa.repeat(pa.scalar(common[column.name], column.type), table.num_rows)
        for column in columns
    ]
    return pa.Table.from_arrays(arrays, names=columns.names).cast(columns)


def _from_ipc(payload: bytes) -> pa.Table:
    with pa.ipc.open_stream(io.BytesIO(payload)) as reader:
        return reader.read_all()
