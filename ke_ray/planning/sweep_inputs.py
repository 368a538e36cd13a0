"""The inputs of a sweep's trials, checked before any of them runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ke_ray import storage
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.errors import ResultsError, UserError
from ke_ray.planning.trials import Trial
from ke_ray.resuscitation.coefficients import find_coefficients
from ke_ray.training.inputs import load_inputs, read_start

_MAX_HASHED_BYTES = 2**28


def fingerprints(trials: Sequence[Trial]) -> dict[str, str]:
    """The local files that the trials' studies name: path → sha256, or the size of a large one."""
    digests: dict[str, str] = {}
    for trial in trials:
        for value in _texts(trial.study.model_dump(mode="json", exclude={"mlflow", "output"})):
            if value not in digests and storage.is_local(value) and _is_file(value):
                path = storage.local_path(value)
                size = path.stat().st_size
                is_small = size <= _MAX_HASHED_BYTES
                digests[value] = (
                    hashlib.sha256(path.read_bytes()).hexdigest() if is_small else f"{size} bytes"
                )
    return digests


def check_unchanged(output: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to resume a sweep whose trials would read something else than the finished ones.

    Raises:
        ResultsError: names the files.
    """
    changed = [path for path, digest in now.items() if before.get(path, digest) != digest]
    if changed:
        raise ResultsError(
            f"{', '.join(map(repr, changed))} changed after the sweep in '{output}' started: its "
            "finished trials and new ones could not be compared. Give a new name with --output, or "
            "put the file back."
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
    packed: set[str] = set()
    checked: set[Any] = set()
    for trial in trials:
        settings = trial.study.resuscitation
        source = settings and (settings.coefficients, settings.control, settings.allow_mismatch)
        if (source, trial.spec.ref) not in checked:
            checked.add((source, trial.spec.ref))
            _check_coefficients(trial)
        if not trial.spec.ref.is_local:
            continue
        inputs = trial.study.model_dump(
            mode="json", exclude={"optimizer", "schedule", "resuscitation", "mlflow", "precision"}
        )
        key = json.dumps([inputs, trial.spec.ref.location], sort_keys=True)
        if key not in packed:
            packed.add(key)
            start = read_start(trial.study, trial.spec.ref, trial.spec.ref.location)
            load_inputs(trial.study, start, trial.spec.seed)


def _check_coefficients(trial: Trial) -> None:
    """Refuse coefficients that are not there or, of a start on this machine, not of its weights."""
    settings, ref = trial.study.resuscitation, trial.spec.ref
    if (
        settings is None
        or settings.control == "attention_temperature"
        or settings.coefficients is None
    ):
        return
    if not storage.exists(settings.coefficients):
        raise UserError(
            f"resuscitation.coefficients is '{settings.coefficients}', which is not there; give "
            "the folder of a scan of the starting checkpoint ('ke-ray scan' makes it)."
        )
    if ref.is_local:
        find_coefficients(
            settings.coefficients,
            weights_sha256=weights_sha256(ref.location),
            checkpoint=ref.name,
            allow_mismatch=settings.allow_mismatch,
        )
