"""Waiting for what another process does: a condition and a generous limit, never a guess."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from command_process import Command


def wait_for(
    condition: Callable[[], object], command: Command | None = None, timeout_s: float = 180.0
) -> None:
    """Until the condition holds; a command that ends before fails the test with what it said."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if command is not None:
            assert command.returncode is None, command.stdout
        assert time.monotonic() < deadline, "" if command is None else command.stdout
        time.sleep(0.02)
