"""Fixtures that every tier shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Fixtures of several folders (tests/helpers).
pytest_plugins = ("tiny_decoders", "tiny_scans")

# Before any test module imports Ray, which reads it then (see ke_ray.engine.cluster.session).
os.environ.setdefault("RAY_AUTH_MODE", "token")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the tests of
# interrupts mean the ordinary answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What passed once passes again. `pytest --hypothesis-profile=search` looks for new inputs.
settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder that holds reference data; the test is skipped where it is absent.

    ``KE_RAY_REFERENCE_DATA`` names a folder with ``golden/`` and ``data/`` inside.
    """
    root = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")).resolve()
    if not (root / "golden").is_dir():
        pytest.skip(f"reference data is absent: no folder {root} (set KE_RAY_REFERENCE_DATA)")
    return root


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The URI of a real tracking server on the loopback."""
    from servers import running_mlflow

    with running_mlflow(tmp_path) as uri:
        yield uri
