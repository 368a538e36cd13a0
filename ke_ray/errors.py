"""Every error that ke_ray raises on purpose.

::

    KeRayError                        exit code 1
    ├── UserError                     exit code 2: the request itself is wrong
    │   ├── ConfigError               a study file, a --set or an option
    │   ├── CheckpointSpecError       a checkpoint SPEC names nothing that exists
    │   ├── UnsupportedArchitectureError
    │   ├── DataError                 documents, token ids, facts, schedules
    │   ├── ResultsError              a result folder cannot be used for this request
    │   └── StorageError              no space, no permission, no such store
    │       └── StoreOutageError      a store went out of order (exit code 1)
    ├── CheckpointError               one checkpoint cannot be fetched, loaded or scored
    ├── DeviceMemoryError             a sound checkpoint does not fit the device that scores it
    ├── PlacementError                the cluster has no node that can hold the work
    └── TrainingError                 a training run cannot continue
        └── NonFiniteLossError

Each takes one message that says what was given, what was expected and what to do. They have no
other state, so that they survive pickling between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ke_ray.secrets import printable


class KeRayError(Exception):
    """Root of the tree; the command line prints the message and ends with ``exit_code``."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(str(message)))  # goes to terminals, logs and result files


class UserError(KeRayError):
    """The request is wrong; nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """A study file, an override or an option is not valid."""


class CheckpointSpecError(UserError):
    """A checkpoint SPEC is malformed or names nothing that exists."""


class UnsupportedArchitectureError(UserError):
    """ke_ray does not support the architecture of the model."""


class DataError(UserError):
    """Documents, token ids, facts, probes or a schedule are not usable."""


class ResultsError(UserError):
    """A result folder cannot be read, or holds results of another identity."""


class StorageError(UserError):
    """A file or store cannot be read or written: full, forbidden or unknown."""


class StoreOutageError(StorageError):
    """A store that answered before has been out of order for too long; finished work is saved."""

    exit_code = 1


class CheckpointError(KeRayError):
    """One checkpoint cannot be fetched, loaded or scored; the others continue."""


class DeviceMemoryError(KeRayError):
    """A device has too little memory for a checkpoint that may be perfectly sound."""


class PlacementError(KeRayError):
    """No node of the cluster can hold the work, and nothing adds nodes."""


class TrainingError(KeRayError):
    """A training run cannot continue."""


class NonFiniteLossError(TrainingError):
    """The loss or the gradient norm became infinite or NaN."""


def row_error(error: BaseException) -> str:
    """Format an exception for a result row's ``error`` column."""
    text = str(error).strip()
    if isinstance(error, KeRayError):
        return text
    return printable(f"{type(error).__name__}: {text}")[:2000]


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.5) -> str:
    """A hint like ``" Did you mean 'learning_rate'?"``, or an empty string.

    Args:
        word: what was given.
        candidates: what would have been valid.
        cutoff: similarity, from 0 to 1, below which there is no hint.
    """
    matches = difflib.get_close_matches(word, sorted(candidates), n=1, cutoff=cutoff)
    return f" Did you mean '{matches[0]}'?" if matches else ""
