"""Patience with stores: an operation is tried again while its store is out of order.

A driver's own retries last seconds. A store that has answered this process before and then answers
500 or 503, or nothing, is waited for up to ten minutes (``KE_RAY_STORE_GIVE_UP_S``, seconds). What
refuses (no permission, no credentials) and what never answered is an error at once: waiting would
not help. Worker processes wait for the stores that their command has reached, which
``KE_RAY_KNOWN_STORES`` names.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from ke_ray.errors import KeRayError, StorageError, StoreOutageError
from ke_ray.secrets import redact
from ke_ray.storage.disk import is_disk_error
from ke_ray.storage.drivers import explain_driver_error, is_remote

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_S, _MAX_PAUSE_S = 0.5, 15.0
# Of botocore; the same request would fail in the same way.
_FINAL = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),
    *("NoRegionError", "UnknownServiceError", "InvalidRegionError", "HttpError"),
)
KNOWN_STORES = "KE_RAY_KNOWN_STORES"
_answered: set[str] = set(os.environ.get(KNOWN_STORES, "").split())
_given_up: set[str] = set()


def give_up_s() -> float:
    """Seconds for which a store may be out of order."""
    return float(os.environ.get("KE_RAY_STORE_GIVE_UP_S", "600"))


def known_stores() -> str:
    """The stores that have answered, for the environment of worker processes.

    Addresses that hold a password are left out: clusters show that environment.
    """
    return " ".join(sorted(store for store in _answered if redact(store) == store))


def forget_store(uri: str) -> None:
    """Take a store for one that never answered, and is not waited for."""
    _answered.discard(_store_of(uri))
    _given_up.discard(_store_of(uri))


def _store_of(uri: str) -> str:
    return "/".join(uri.split("/")[:3])


def on_store(uri: str, operation: Callable[[], T]) -> T:
    """The result of an operation on ``uri``, tried again while its store is out of order.

    Operations must be such that doing them twice is doing them once.

    Raises:
        StoreOutageError: the store was out of order for ``give_up_s()``.
        StorageError: it refuses, or has not answered before.
        OSError: FileNotFoundError and the like, which are answers; and those of local paths.
    """
    if not is_remote(uri):
        return operation()
    store = _store_of(uri)
    # Asked once: another thread that loses patience first must not end this one's.
    known, started, attempts = store in _answered, time.monotonic(), 0
    while True:
        attempts += 1
        try:
            result = operation()
        except KeRayError:
            raise
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            _answered.add(store)
            raise
        except Exception as error:  # each driver has its own kinds
            if is_disk_error(error):
                raise  # of a copy to this machine
            waited_s = time.monotonic() - started
            reason = explain_driver_error(error) or _one_line(error)
            if isinstance(error, PermissionError):
                raise StorageError(
                    f"The store refuses access to '{redact(uri)}': {reason}. Use keys that may "
                    "read and write there, or another place."
                ) from error
            if _is_final(error) or not (known or store in _given_up):
                raise StorageError(f"Cannot reach '{redact(uri)}': {reason}.") from error
            if waited_s >= give_up_s() or store in _given_up:
                _given_up.add(store)  # the next operation need not wait as long
                raise StoreOutageError(
                    f"Cannot reach '{redact(uri)}': {reason} ({attempts} attempts in "
                    f"{waited_s:.0f} s). Finished work is saved. Run the same command again to "
                    "resume once the store answers."
                ) from error
            if attempts == 1:
                log.warning(
                    "%s is out of order (%s); trying again for up to %.0f s.",
                    *(redact(store), reason, give_up_s()),
                )
            pause_s = min(_PAUSE_S * 2 ** min(attempts, 10), _MAX_PAUSE_S)
            time.sleep(max(0.0, min(pause_s, give_up_s() - waited_s)))
        else:
            if attempts > 1:
                log.warning("%s answers again.", redact(store))
            _answered.add(store)
            _given_up.discard(store)
            return result


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of aiohttp and gcsfs
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return True
    return isinstance(error, PermissionError | ValueError | TypeError) or (
        type(error).__name__ in _FINAL
    )


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
