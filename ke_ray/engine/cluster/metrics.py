"""Prometheus metrics of a running study, through Ray.

Every metric is declared once, in :data:`METRICS`; ``dashboards/grafana`` shows them. Ray exports
them on each node with the prefix ``ray_`` (counters end in ``_total`` there) and adds labels of its
own (``NodeAddress``, ``WorkerId``, …). Two of Ray's habits shape the table: it forgets a gauge that
was not set for twenty seconds, so gauges are set again and again; and it rebuilds histograms from
the middles of their buckets, so seconds are counted instead, exactly.

Nothing is recorded per token: the scan's driver records once a second, a training worker when the
loop has looked at its losses, at most once a second.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ke_ray.outcomes import Display, ScanOutcome
from ke_ray.planning.scan_items import CheckpointWork
from ke_ray.studies.parts import study_label

if TYPE_CHECKING:  # torch, which the driver of a scan does without
    from ke_ray.training.loop import Progress
    from ke_ray.training.snapshot import Snapshot


@dataclass(frozen=True)
class Metric:
    """One metric: counters add what is recorded, gauges hold the last of it."""

    kind: Literal["counter", "gauge"]
    unit: str
    description: str
    tags: tuple[str, ...] = ("study",)


METRICS = {
    "ke_ray_scan_checkpoints": Metric(
        "counter", "checkpoints", "Checkpoints that came to an end.", ("study", "status")
    ),
    "ke_ray_scan_queue": Metric("gauge", "checkpoints", "Checkpoints still to be scored."),
    "ke_ray_scan_tokens": Metric("counter", "tokens", "Tokens scored, over all corpora."),
    "ke_ray_scan_scorers": Metric("gauge", "scorers", "Scorers of the running scan."),
    "ke_ray_scan_idle_share": Metric(
        "gauge", "fraction", "Share of the scorers' last minute in which they did not score."
    ),
    "ke_ray_scan_loads": Metric("counter", "loads", "Checkpoints loaded; again for each cut."),
    "ke_ray_scan_load_seconds": Metric("counter", "seconds", "Time of loading checkpoints."),
    "ke_ray_scan_fetch_seconds": Metric("counter", "seconds", "Time of fetching checkpoints."),
    "ke_ray_training_tokens": Metric("counter", "tokens", "Tokens trained on.", ("study", "run")),
    "ke_ray_training_loss_nats": Metric(
        "gauge", "nats per token", "Training loss of the last step.", ("study", "run")
    ),
    "ke_ray_training_left_seconds": Metric(
        "gauge", "seconds", "Time until the last step at the speed so far.", ("study", "run")
    ),
    "ke_ray_probe_knowledge_nats": Metric(
        "gauge", "nats per token", "K of the last probes.", ("study", "run", "setting")
    ),
    "ke_ray_sweep_trials_planned": Metric(
        "counter", "trials", "Trials that commands started with."
    ),
    "ke_ray_sweep_trials": Metric(
        "counter", "trials", "Trials that came to an end.", ("study", "status")
    ),
}

_EVERY_S = 1.0
_IDLE_WINDOW_S = 60.0
_metrics: dict[str, Any] = {}  # Ray's objects by name, made when they are first recorded


def record(name: str, value: float, **tags: str) -> None:
    """Add to a counter or set a gauge of :data:`METRICS`; nothing without a Ray session."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    metric = METRICS[name]
    if metric.kind == "counter" and value <= 0:
        return
    if name not in _metrics:
        from ray.util.metrics import Counter, Gauge

        kind = Counter if metric.kind == "counter" else Gauge
        text = f"{metric.description} Unit: {metric.unit}."
        _metrics[name] = kind(name, text, tag_keys=metric.tags)
    (_metrics[name].inc if metric.kind == "counter" else _metrics[name].set)(value, tags)


class ScanMeter:
    """Stands between a scan and its display: passes everything on, and records it."""

    def __init__(
        self,
        display: Display,
        outcome: ScanOutcome,
        study: str,
        works: Sequence[CheckpointWork],
    ) -> None:
        self._display, self._outcome, self._study = display, outcome, study
        self._queue, self._num_scorers = len(works), 1
        self._total = sum(work.num_tokens for work in works)
        self._num_tokens = self._num_bytes = 0
        self._num_timed = len(outcome.timings)  # those of earlier rounds are recorded
        self._busy: deque[tuple[float, float]] = deque([(time.monotonic(), 0.0)])

    def tick(self, num_tokens: int, busy_s: float, num_scorers: int) -> None:
        """Once a second: tokens scored and seconds of scoring so far, over all scorers."""
        self._num_scorers = num_scorers
        self._display.tokens(num_tokens, self._total)
        self._record("tokens", num_tokens - self._num_tokens)
        self._num_tokens = num_tokens
        for timing in self._outcome.timings[self._num_timed :]:
            self._record("loads", "load_s" in timing)
            self._record("load_seconds", timing.get("load_s", 0.0))
            self._record("fetch_seconds", timing.get("fetch_s", 0.0))
            self._num_timed += 1
        self._record("queue", self._queue)
        self._record("scorers", self._num_scorers)
        self._record("idle_share", self._idle_share(busy_s))

    def loaded(self, num_bytes: int) -> None:
        """A scorer has fetched or read a checkpoint of this size."""
        self._num_bytes += num_bytes
        self._display.loaded(self._num_bytes)

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One checkpoint is done."""
        self._display.ended(name, rows)
        self._queue -= 1
        status = "ok" if all(row["status"] == "ok" for row in rows) else "failed"
        record("ke_ray_scan_checkpoints", 1, study=self._study, status=status)

    def _record(self, name: str, value: float) -> None:
        record(f"ke_ray_scan_{name}", value, study=self._study)

    def _idle_share(self, busy_s: float) -> float:
        now = time.monotonic()
        self._busy.append((now, busy_s))
        while now - self._busy[1][0] > _IDLE_WINDOW_S:
            self._busy.popleft()
        started, busy_before = self._busy[0]
        share = (busy_s - busy_before) / max((now - started) * self._num_scorers, 1e-9)
        return min(max(1.0 - share, 0.0), 1.0)


class TrainingMeter:
    """Stands between the training loop's main worker and those who watch it.

    Args:
        study: the training study.
        run: its run.
        on_progress, on_probes: called with everything too.
    """

    def __init__(
        self,
        study: Any,
        run: str,
        on_progress: Callable[..., None],
        on_probes: Callable[[int, Snapshot], None] | None = None,
    ) -> None:
        self._tags = {"study": study_label(study), "run": run}
        self._on_progress, self._on_probes = on_progress, on_probes
        self._knowledge: dict[str, float] = {}
        self._num_tokens: int | None = None
        self._last = 0.0

    def __call__(self, progress: Progress, **more: Any) -> None:
        """The loop has looked at its losses."""
        self._on_progress(progress, **more)
        row, now = progress.record, time.monotonic()
        if self._num_tokens is None:  # a resumed run has tokens of earlier processes
            self._num_tokens = row.num_tokens - row.num_tokens // row.step
        if now - self._last < _EVERY_S and row.step < progress.num_steps:
            return
        self._last = now
        record("ke_ray_training_tokens", row.num_tokens - self._num_tokens, **self._tags)
        self._num_tokens = row.num_tokens
        record("ke_ray_training_loss_nats", row.loss, **self._tags)
        record("ke_ray_training_left_seconds", progress.time_left_s, **self._tags)
        self._record_knowledge()

    def probes(self, step: int, snapshot: Snapshot) -> None:
        """The probes were evaluated after ``step`` steps."""
        if self._on_probes is not None:
            self._on_probes(step, snapshot)
        values = np.array(snapshot.paragraphs)
        settings = np.array(snapshot.settings)
        self._knowledge = {str(s): float(values[settings == s].mean()) for s in set(settings)}
        self._record_knowledge()

    def _record_knowledge(self) -> None:
        for setting, value in self._knowledge.items():
            record("ke_ray_probe_knowledge_nats", value, setting=setting, **self._tags)
