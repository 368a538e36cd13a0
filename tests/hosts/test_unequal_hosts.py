"""Hosts that declare few and many cores, and a working folder that only the head has."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
from lab_cluster import LabCluster
from lab_studies import STORE

from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def large_host(cluster: LabCluster) -> Iterator[str]:
    """One more worker's host, with 32 declared cores; the others have two or four."""
    yield cluster.join("h9", "--num-cpus=32").address
    cluster.lab.kill("h9")


def test_a_scan_from_a_folder_that_workers_lack_uses_the_host_with_most_cores(
    cluster: LabCluster, large_host: str
) -> None:
    output = f"{STORE}/unequal"
    words = [
        *("python", "-m", "ke_ray", "scan", f"{STORE}/series/checkpoints", "--no-mlflow"),
        *("--data", f"ids={STORE}/ids.npy", "--num-instances", "40", "--sequence-length", "24"),
        *("--output", output),
    ]
    script = f"mkdir /tmp/only-here && cd /tmp/only-here && {shlex.join(words)}"
    head = cluster.lab.hosts["h1"]
    done = head.run("sh", "-c", script, environment=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 scanned, 0 failed" in " ".join(done.stdout.split())
    assert large_host in cluster.addresses_of("CheckpointScorer")
    assert {row["status"] for row in ScanFolder.open(output).entropy().to_pylist()} == {"ok"}
