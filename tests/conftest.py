"""Fixtures that every tier shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before any test module imports Ray, which reads it then (see ke_ray.engine.session).
os.environ.setdefault("RAY_AUTH_MODE", "token")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the tests of
# interrupts mean the ordinary answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder that holds reference data; the test is skipped where it is absent.

    ``KE_RAY_REFERENCE_DATA`` names a folder with ``golden/`` and ``data/`` inside.
    """
    root = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")).resolve()
    if not (root / "golden").is_dir():
        pytest.skip(f"reference data is absent: no folder {root} (set KE_RAY_REFERENCE_DATA)")
    return root
