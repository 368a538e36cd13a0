"""Picture, report and MLflow artifacts, made from the results of a command."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray import storage
from ke_ray.errors import KeRayError
from ke_ray.report import build_report

if TYPE_CHECKING:
    from ke_ray.studies.parts import TrackingSettings
    from ke_ray.tracking.run import TrackedRun

log = logging.getLogger(__name__)


def publish_scan(output: str, run: TrackedRun) -> None:
    """Write ``entropy.png`` and ``report.html``; log them, the table and the manifest to MLflow.

    A scan whose checkpoints all failed has no picture, which is not an error.
    """
    from ke_ray.report.picture import picture
    from ke_ray.report.terminal import headline_rows, rows_as_csv
    from ke_ray.resuscitation.prediction import read_predictions

    run.log_text(rows_as_csv(headline_rows([output])), "headline.csv")
    names = ["entropy.parquet", "manifest.json"]
    names += ["resuscitation.parquet"] if read_predictions(output) else []
    try:
        picture(output, storage.join(output, "entropy.png"))
        names.append("entropy.png")
    except KeRayError as error:
        log.info("no picture: %s", error)
    except Exception:  # the results are complete; a picture must not fail the command
        log.exception("The picture could not be drawn")
    names.append(_write_report(output))
    if storage.is_local(output):
        for name in names:
            run.log_artifact(Path(storage.local_path(output), name))
    run.flush()


def publish_report(output: str, settings: TrackingSettings, run_ids: Iterable[str | None]) -> None:
    """Write ``report.html`` into a result folder and log it to MLflow runs."""
    from ke_ray.tracking.tracker import open_tracker

    name = _write_report(output)
    ids = sorted({run_id for run_id in run_ids if run_id})
    if not (ids and settings.enabled and storage.is_local(output)):
        return
    with open_tracker(settings, deferred=True) as tracker:
        for run_id in ids:
            tracker.run(run_id).log_artifact(Path(storage.local_path(output), name))


def _write_report(output: str) -> str:

    name = "report.html"
    build_report([output], storage.join(output, name))
    return name
