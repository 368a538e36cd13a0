"""A scan in MLflow: one run, metrics with step = pretraining step.

Points carry the time the result folder was created, not the time they are sent, so that sending
one twice changes nothing: what a killed driver had not sent yet is sent when the scan resumes.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ke_ray.planning.scan import ScanSetup
from ke_ray.studies.parts import study_label
from ke_ray.tracking.run import TrackedRun
from ke_ray.tracking.tracker import Tracker


def start_scan_run(setup: ScanSetup, tracker: Tracker) -> TrackedRun:
    """Start or continue the run of this output folder; parameters, tags and datasets logged."""
    study = setup.study
    run = tracker.start_run(
        study_label(study),
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
    """Log the results of this scan's checkpoints that the folder has already."""
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

    At its position in the listing instead where it has no step, or where the steps of the listing
    start again in a later stage or series.
    """
    metrics: dict[str, float] = {}
    step = index
    ok = [row for row in rows if row["status"] == "ok"]
    for row in ok:
        step = row["step"] if setup.steps_rise and row["step"] is not None else index
        part = "total" if row["layer"] is None else f"layer_{row['layer']:02d}"
        corpus = f"/{row['corpus']}" if len(setup.study.data) > 1 else ""
        if row["value"] is not None:
            metrics[f"{row['measure']}{corpus}/{part}_{row['unit']}"] = row["value"]
    if not ok:
        return
    run.log_metrics(metrics, step, _created_ms(setup))
    sha256 = _first(row["weights_sha256"] for row in ok)
    if sha256:
        run.set_tags({f"weights_sha256.{ok[0]['checkpoint']}": sha256})


def log_predictions(run: TrackedRun, rows: Sequence[Mapping[str, Any]], setup: ScanSetup) -> None:
    """Log what resuscitation was predicted to make of the entropy, beside what was measured."""
    positions = {ref.name: index for index, ref in enumerate(setup.refs)}
    first = next(iter(setup.corpora))
    for row in rows:
        if row["layer"] is None and row["corpus"] == first and row["predicted_nats"] is not None:
            has_step = setup.steps_rise and row["step"] is not None
            step = row["step"] if has_step else positions.get(row["checkpoint"], 0)
            metrics = {
                "knowledge_entropy_before/total_nats": row["before_nats"],
                "knowledge_entropy_predicted/total_nats": row["predicted_nats"],
            }
            run.log_metrics(metrics, step, _created_ms(setup))


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value), None)


def _created_ms(setup: ScanSetup) -> int:
    created = datetime.datetime.fromisoformat(setup.folder.manifest["created_at"])
    return int(created.timestamp() * 1000)
