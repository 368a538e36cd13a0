"""The laboratory that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import s3fs
from lab import why_not
from lab_cluster import BUCKET, LabCluster, running_cluster
from lab_studies import make_data

_HOSTS = pytest.StashKey[ExitStack]()


@pytest.fixture(scope="session")
def three_hosts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabCluster]:
    """A head without CPUs and two workers that declare two; S3 and MLflow on hosts of their own."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        request.config.stash[_HOSTS] = stack
        yield stack.enter_context(running_cluster(tmp_path_factory.mktemp("hosts")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """End the hosts after their last test: idle, they take a tenth of a core from all others."""
    yield
    if _HOSTS in item.config.stash and "three_hosts" not in getattr(nextitem, "fixturenames", ()):
        item.config.stash[_HOSTS].close()


@pytest.fixture(scope="session")
def data(
    three_hosts: LabCluster, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What lies on the store, as local files."""
    folder = tmp_path_factory.mktemp("store")
    make_data(pretrained, folder)
    endpoint = three_hosts.s3_here["AWS_ENDPOINT_URL"]
    files = s3fs.S3FileSystem(key="lab", secret="lab", endpoint_url=endpoint)
    files.put(f"{folder}/", f"{BUCKET}/", recursive=True)
    three_hosts.wait_for_mlflow()
    return folder


@pytest.fixture
def cluster(
    three_hosts: LabCluster, data: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LabCluster]:
    """The cluster with the data on its store, which this process reaches too."""
    for name, value in three_hosts.s3_here.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it may lead to another store
    yield three_hosts
    s3fs.S3FileSystem.clear_instance_cache()
