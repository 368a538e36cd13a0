"""What the trials of a sweep read, looked at before any of them runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.errors import ResultsError, UserError

if TYPE_CHECKING:
    from ke_ray.planning.trials import Trial

__all__ = ["check_inputs", "check_unchanged", "fingerprints"]

_MAX_HASHED_BYTES = 2**28


def fingerprints(trials: Sequence[Trial]) -> dict[str, str]:
    """The local files that the trials' studies name: path → sha256, or the size of a large one."""
    found: dict[str, str] = {}
    for trial in trials:
        for value in _texts(trial.study.model_dump(mode="json", exclude={"mlflow", "output"})):
            if value not in found and storage.is_local(value) and _is_file(value):
                path = storage.local_path(value)
                size = path.stat().st_size
                small = size <= _MAX_HASHED_BYTES
                found[value] = (
                    hashlib.sha256(path.read_bytes()).hexdigest() if small else f"{size} bytes"
                )
    return found


def check_unchanged(output: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a sweep whose trials would read something else than the finished ones.

    Raises:
        ResultsError: names the files.
    """
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    if changed:
        raise ResultsError(
            f"'{output}' was begun with other contents of {', '.join(map(repr, changed))}: its "
            "finished trials and new ones could not be compared. Give a new name with --output "
            "(or put the file back)."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)


def _is_file(text: str) -> bool:
    try:
        return storage.local_path(text).is_file()
    except (OSError, ValueError):  # a text that can be no path
        return False


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
        from ke_ray.checkpoints.formats.fingerprint import weights_sha256
        from ke_ray.resuscitation.coefficients import find_coefficients

        find_coefficients(
            keys.coefficients,
            weights_sha256=weights_sha256(ref.location),
            checkpoint=ref.name,
            allow_mismatch=keys.allow_mismatch,
        )
