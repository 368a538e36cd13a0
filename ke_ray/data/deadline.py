"""A deadline for network calls whose own client would retry for minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from ke_ray.errors import DataError

START_TIMEOUT_S = 12.0  # a missing network is reported within 20 seconds

ValueT = TypeVar("ValueT")


def within(seconds: float, task: Callable[[], ValueT], what: str) -> ValueT:
    """The result of ``task()``, if it comes within ``seconds``.

    The task runs in a daemon thread, which is abandoned when it takes too long.

    Args:
        what: what cannot be done when this fails; the message starts with it.

    Raises:
        DataError: the task took too long, or raised.
    """
    future: Future[ValueT] = Future()

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([future], timeout=seconds)
    if not future.done():
        raise DataError(
            f"{what}: no answer within {seconds:.0f} s. Is there a network? Local files work "
            "without one."
        )
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, DataError):
        raise error
    lines = str(error).strip().splitlines()
    raise DataError(f"{what}: {type(error).__name__}: {lines[0] if lines else ''}") from error
