"""Fixtures that every tier shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from servers import Gate

# Fixtures of several folders (tests/helpers).
pytest_plugins = ("tiny_decoders", "tiny_scans", "built_site")

# Before any test module imports Ray, which reads it then (see ke_ray.engine.cluster.session).
os.environ.setdefault("RAY_AUTH_MODE", "token")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the tests of
# interrupts mean the ordinary answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What passed once passes again. `pytest --hypothesis-profile=search` looks for new inputs. No test
# is timed: a busy machine is slow now and then.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _measures_end_with_the_test() -> Iterator[None]:
    """A measure by intervention is registered where its name is first met."""
    from ke_ray.core.measures import MEASURES
    from ke_ray.core.sums import SUMS

    before = dict(MEASURES), dict(SUMS)
    yield
    for registry, own in zip((MEASURES, SUMS), before, strict=True):
        registry.clear()
        registry.update(own)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder that holds reference data; the test is skipped where it is absent.

    ``KE_RAY_REFERENCE_DATA`` names a folder with ``golden/`` and ``data/`` inside.
    """
    root = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")).resolve()
    if not (root / "golden").is_dir():
        pytest.skip(f"reference data is absent: no folder {root} (set KE_RAY_REFERENCE_DATA)")
    return root


@pytest.fixture(scope="session")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests' MLflow server has its database, artifacts and log."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def mlflow_server(mlflow_folder: Path) -> Iterator[str]:
    """The URI of a real tracking server on the loopback; each test takes its own experiment."""
    from servers import running_mlflow

    with running_mlflow(mlflow_folder) as uri:
        yield uri


@pytest.fixture
def mlflow_gate(mlflow_server: str) -> Iterator[Gate]:
    """A way to that server which a test closes and opens; open."""
    from servers import Gate

    with Gate(int(mlflow_server.rsplit(":", 1)[1])) as gate:
        yield gate


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket of an S3 service on the loopback, to which the environment leads."""
    from servers import running_s3

    with (
        pytest.MonkeyPatch.context() as patch,
        running_s3(tmp_path_factory.mktemp("s3")) as variables,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        yield "s3://shared"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pretraining, which tests only read."""
    from tiny_studies import tiny_pretrain

    from ke_ray.training.pretrain import run_pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    run_pretrain(tiny_pretrain(folder))
    return folder


#: What is dear to start, the dearest first. Tests that use the same of these run in one process,
#: which starts it once; the others of a file stay together. What takes longest comes first, so
#: that the processes end together.
_SHARED = ("mlflow_server", "three_hosts", "ray_cluster", "installed", "chromium")
_LONGEST = "test_demo.py"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group and order the tests for ``--dist loadgroup``."""
    ranks = {}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared = next((name for name in _SHARED if name in fixtures), None)
        if shared:
            item.add_marker(pytest.mark.xdist_group(shared))
        if item.path.name == _LONGEST:
            ranks[item] = 0
        elif shared:
            ranks[item] = 1 + _SHARED.index(shared)
        else:
            ranks[item] = 8 if item.get_closest_marker("slow") else 9
    items.sort(key=ranks.__getitem__)


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to schedule
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of no group go by file."""
    from xdist.scheduler import LoadGroupScheduling

    class ByGroupOrFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).split("::", 1)[0]

    return ByGroupOrFile(config, log) if config.getoption("dist") == "loadgroup" else None
