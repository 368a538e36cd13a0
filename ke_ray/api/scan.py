"""Running a scan from Python."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ke_ray.api.publish import publish_scan
from ke_ray.config import load_study, set_keys, validate
from ke_ray.engine.scan.run import cluster_gpus, run_scan
from ke_ray.outcomes import Display, ScanOutcome
from ke_ray.planning.scan import prepare_scan
from ke_ray.planning.scan_tracking import log_predictions
from ke_ray.results.columns import TABLES
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.resuscitation.prediction import write_predictions
from ke_ray.shipped import find_study
from ke_ray.storage.ownership import claimed
from ke_ray.studies.scan import ScanStudy
from ke_ray.tracking.tracker import open_tracker

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def run_scan_study(study: ScanStudy, display: Display | None = None) -> ScanOutcome:
    """Run a scan on Ray, and write its results, picture and report into ``study.output``.

    What the folder has already is not scored again.

    Raises:
        KeRayError: the study cannot be run as it stands; of single checkpoints, failures are rows.
    """
    display = display or Display()
    with claimed(study.output, "scan"), cluster_gpus() as gpus:
        setup = prepare_scan(study, gpus)
        for key in ("dtype", "matmul_precision"):
            if getattr(study, key) == "auto":
                display.say(f"{key}: auto is {getattr(setup.study, key)} here")
        with open_tracker(study.mlflow) as tracker:
            outcome = run_scan(setup, display, tracker)
            run = tracker.run(outcome.mlflow_run_id)
            log_predictions(run, write_predictions(study.output), setup)
            publish_scan(study.output, run)
    return outcome


def scan(
    study: str | ScanStudy, /, data: Mapping[str, str] | None = None, **keys: Any
) -> pd.DataFrame:
    """Score every checkpoint of a series as ``ke-ray scan`` does, and return its rows.

    ::

        rows = ke_ray.scan("EleutherAI/pythia-160m", {"c4": "c4.jsonl.gz"}, num_instances=64,
                           output="runs/pythia", **{"checkpoints.every": 10})

    Args:
        study: checkpoints (a SPEC), a study file, the name of a shipped study, or a study.
        data: corpora, name → source; needed with a SPEC.
        **keys: keys of :class:`~ke_ray.studies.scan.ScanStudy`, ``output`` among them; a dotted
            one sets a key of a part.

    Returns:
        The rows of ``entropy.parquet`` (docs/results.md), failed checkpoints included, with the
        units of columns in ``attrs["units"]``; ``value`` and ``stderr`` are in the unit of their
        row.

    Raises:
        KeRayError: the study is wrong or cannot be run.
    """
    loaded = _study(study, dict(keys) if data is None else {"data": dict(data), **keys})
    outcome = run_scan_study(loaded)
    for name, error in outcome.failures:
        log.warning("%s: %s", name, error)
    frame = ScanFolder.open(loaded.output).entropy().to_pandas()
    frame.attrs["units"] = {
        column.name: column.unit
        for column in TABLES["entropy"]
        if column.unit and column.name in frame
    }
    return frame


def _study(study: str | ScanStudy, keys: dict[str, Any]) -> ScanStudy:
    if isinstance(study, ScanStudy):
        values = study.model_dump(exclude_unset=True)
        return validate(ScanStudy, set_keys(values, keys), "ke_ray.scan") if keys else study
    file = find_study(study)
    if file is None:
        return validate(ScanStudy, set_keys({}, {"checkpoints.spec": study, **keys}), "ke_ray.scan")
    values = load_study(file, ScanStudy).model_dump(exclude_unset=True)
    return validate(ScanStudy, set_keys(values, keys), file)
