"""What a command leaves beside its results for people: the picture and the MLflow artifacts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray import storage
from ke_ray.errors import KeRayError

if TYPE_CHECKING:
    from ke_ray.tracking import TrackedRun

__all__ = ["publish_scan"]

log = logging.getLogger(__name__)


def publish_scan(output: str, run: TrackedRun) -> None:
    """Draw ``entropy.png`` into the folder; log it, the table and the manifest to MLflow.

    A scan whose checkpoints all failed has nothing to draw; that is no error here.
    """
    from ke_ray.report.picture import picture
    from ke_ray.report.terminal import headline_rows, rows_as_csv

    run.log_text(rows_as_csv(headline_rows([output])), "headline.csv")
    try:
        image = picture(output, storage.join(output, "entropy.png"))
    except KeRayError as error:
        log.info("no picture: %s", error)
        image = None
    for name in ("entropy.parquet", "manifest.json", *(["entropy.png"] if image else [])):
        if storage.is_local(output):
            run.log_artifact(Path(storage.local_path(output), name))
    run.flush()
