"""A sweep whose trials take about a second each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_studies import tiny_continual

from ke_ray.config import validate
from ke_ray.studies.sweep import SweepStudy


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
