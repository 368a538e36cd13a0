"""The laboratory that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import why_not
from lab_cluster import LabCluster, running_cluster


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabCluster]:
    """A head without CPUs and two workers that declare two; S3 and MLflow on hosts of their own."""
    if reason := why_not():
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster
