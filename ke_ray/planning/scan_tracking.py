"""A scan in MLflow: one run, metrics with step = pretraining step.

Points carry the time the results began, not the time they are sent, so that sending one twice
changes nothing: what a killed driver had not sent yet is sent when the scan goes on.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ke_ray.tracking.tracker import TrackedRun, Tracker

if TYPE_CHECKING:
    from ke_ray.planning.scan import ScanSetup

__all__ = ["log_finished", "log_predictions", "log_scan_metrics", "start_scan_run"]


def start_scan_run(setup: ScanSetup, tracker: Tracker) -> TrackedRun:
    """Start or continue the run of this output folder; parameters, tags and datasets logged."""
    study = setup.study
    name = study.name or study.output.rstrip("/").rsplit("/", 1)[-1]
    run = tracker.start_run(
        name,
        # The folder's own id: a folder that is removed and made again is another run.
        key=f"scan:{setup.folder.manifest['id']}",
        kind="scan",
        params=study.model_dump(exclude={"mlflow", "output"}),
        tags={"ke_ray.output": study.output}
        | {f"data_sha256.{name}": c.sha256 for name, c in setup.corpora.items()},
    )
    for corpus in setup.corpora.values():
        run.log_dataset(corpus.name, corpus.sha256, corpus.source, "scan")
    return run


def log_finished(run: TrackedRun, setup: ScanSetup) -> None:
    """Log what the folder holds already of this scan's checkpoints."""
    if run.run_id is None or not setup.num_skipped:
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in setup.folder.entropy().to_pylist():
        rows.setdefault(row["checkpoint"], []).append(row)
    for index, ref in enumerate(setup.refs):
        log_scan_metrics(run, rows.get(ref.name, []), index, setup)


def log_scan_metrics(
    run: TrackedRun, rows: Sequence[Mapping[str, Any]], index: int, setup: ScanSetup
) -> None:
    """Log one checkpoint's values at step = pretraining step.

    At its place in the listing instead where it has no step, or where the steps of the listing
    start again in a later stage or series.
    """
    metrics: dict[str, float] = {}
    step = index
    ok = [row for row in rows if row["status"] == "ok"]
    for row in ok:
        step = row["step"] if setup.steps_rise and row["step"] is not None else index
        place = "total" if row["layer"] is None else f"layer_{row['layer']:02d}"
        corpus = f"/{row['corpus']}" if len(setup.study.data) > 1 else ""
        metrics[f"{row['measure']}{corpus}/{place}_{row['unit']}"] = row["value"]
    if not ok:
        return
    run.log_metrics(metrics, step, _began_ms(setup))
    sha256 = _first(row["weights_sha256"] for row in ok)
    if sha256:
        run.set_tags({f"weights_sha256.{ok[0]['checkpoint']}": sha256})


def log_predictions(run: TrackedRun, rows: Sequence[Mapping[str, Any]], setup: ScanSetup) -> None:
    """Log what resuscitation was predicted to make of the entropy, beside what was measured."""
    index = {ref.name: place for place, ref in enumerate(setup.refs)}
    first = next(iter(setup.corpora))
    for row in rows:
        if row["layer"] is None and row["corpus"] == first and row["predicted_nats"] is not None:
            known = setup.steps_rise and row["step"] is not None
            step = row["step"] if known else index.get(row["checkpoint"], 0)
            metrics = {
                "knowledge_entropy_before/total_nats": row["before_nats"],
                "knowledge_entropy_predicted/total_nats": row["predicted_nats"],
            }
            run.log_metrics(metrics, step, _began_ms(setup))


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value), None)


def _began_ms(setup: ScanSetup) -> int:
    began = datetime.datetime.fromisoformat(setup.folder.manifest["created_at"])
    return int(began.timestamp() * 1000)
