"""A sweep whose trials take about a second each."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from tiny_studies import tiny_continual

from ke_ray.config import validate
from ke_ray.planning.sweep import SweepPlan
from ke_ray.planning.trials import Trial
from ke_ray.results.manifest import new_manifest, write_manifest
from ke_ray.studies.identity import identity_fields, identity_keys
from ke_ray.studies.sweep import SweepStudy
from ke_ray.training.runs import base_row, write_row


def tiny_sweep(output: Path, series: Path, *, base: Any = None, **changes: Any) -> SweepStudy:
    """Factors 0.5 and 2 and the original, on the last checkpoint of the tiny series.

    Args:
        base: changes of the continual study; the rest changes the sweep.
    """
    keys = {
        "starts": {"steps": "10:10"},
        "executor": "ray",
        "keep_final": False,
        "held_out": None,
        "probes": {"every": None, "around_injections": False},
        "resuscitation": {"ratio": 0.5, "factor": 1.0},
        **(base or {}),
    }
    study = tiny_continual(output, series, **keys)
    values: dict[str, Any] = {
        "kind": "sweep",
        "output": str(output),
        "base": study.model_dump(mode="json", exclude_unset=True),
        "space": {"resuscitation.factor": [0.5, 2]},
        "points": [{"resuscitation": None}],
        "objectives": ["acquisition", "forgetting"],
        "mlflow": {"enabled": False},
        **changes,
    }
    return validate(SweepStudy, {k: v for k, v in values.items() if v is not None}, "tiny_sweep")


def finish(trial: Trial, acquisition: float | None, status: str = "ok", **more: Any) -> None:
    """Leave the row that a trial would."""
    row = {**base_row(trial.study, trial.spec), "status": status, "acquisition": acquisition}
    write_row(trial.study, trial.spec, {**row, "error": None, **more})


def begin(plan: SweepPlan) -> None:
    """Leave what a command writes at its start."""
    study = plan.study
    keys = {
        "id": uuid.uuid4().hex,
        **identity_fields(identity_keys(study)),
        "files": plan.files,
    }
    config = study.model_dump(mode="json", by_alias=True)
    write_manifest(
        study.output, new_manifest("sweep", config) | keys | {"parameters": study.swept_keys}
    )
    plan.save_points()
