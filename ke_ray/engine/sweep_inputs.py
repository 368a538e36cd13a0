"""What the trials of a sweep read, looked at before any of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.errors import UserError

if TYPE_CHECKING:
    from ke_ray.engine.sweep_plan import Trial

__all__ = ["check_inputs"]


def check_inputs(trials: Sequence[Trial]) -> None:
    """Read and pack what trials read, once for each corpus, shape, tokenizer and seed.

    Raises:
        UserError: something is not there or cannot be read, or coefficients are of other weights.
    """
    from ke_ray.training.inputs import load_inputs, read_start

    seen: set[str] = set()
    checked: set[Any] = set()
    for trial in trials:
        keys = trial.study.resuscitation
        found = (keys and (keys.coefficients, keys.control, keys.allow_mismatch), trial.spec.ref)
        if found not in checked:
            checked.add(found)
            _check_coefficients(trial)
        if not trial.spec.ref.is_local:
            continue
        same = trial.study.model_dump(
            mode="json", exclude={"optimizer", "schedule", "resuscitation", "mlflow", "precision"}
        )
        key = json.dumps([same, trial.spec.ref.location], sort_keys=True)
        if key not in seen:
            seen.add(key)
            start = read_start(trial.study, trial.spec.ref, trial.spec.ref.location)
            load_inputs(trial.study, start, trial.spec.seed)


def _check_coefficients(trial: Trial) -> None:
    """Refuse coefficients that are not there or, of a start on this machine, not of its weights."""
    keys, ref = trial.study.resuscitation, trial.spec.ref
    if keys is None or keys.control == "attention_temperature" or keys.coefficients is None:
        return
    if not storage.exists(keys.coefficients):
        raise UserError(
            f"resuscitation.coefficients is '{keys.coefficients}', which is not there; give the "
            "folder of a scan of the starting checkpoint ('ke-ray scan' makes it)."
        )
    if ref.is_local:
        from ke_ray.models.fingerprint import weights_sha256
        from ke_ray.results.coefficients import find_coefficients

        find_coefficients(
            keys.coefficients,
            weights_sha256=weights_sha256(ref.location),
            checkpoint=ref.name,
            allow_mismatch=keys.allow_mismatch,
        )
