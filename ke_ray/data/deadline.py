"""A deadline for network calls whose own client would retry for minutes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ke_ray.errors import DataError

START_TIMEOUT_S = 12.0  # "no network" is said within 20 seconds

ValueT = TypeVar("ValueT")


def within(seconds: float, task: Callable[[], ValueT], what: str) -> ValueT:
    """What ``task()`` returns, if it does so within ``seconds``.

    The task runs in a daemon thread, which is left behind when it takes too long.

    Args:
        what: what cannot be done when this fails; the message starts with it.

    Raises:
        DataError: too slow, or the task raised.
    """
    outcome: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            outcome.put((True, task()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        worked, value = outcome.get(timeout=seconds)
    except queue.Empty:
        raise DataError(
            f"{what}: no answer within {seconds:.0f} s. Is there a network? Local files work "
            "without one."
        ) from None
    if worked:
        result: ValueT = value
        return result
    if isinstance(value, DataError):
        raise value
    lines = str(value).strip().splitlines()
    raise DataError(f"{what}: {type(value).__name__}: {lines[0] if lines else ''}") from value
