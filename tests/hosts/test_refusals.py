"""What some host lacks or does not reach is one message that names it, before work starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from lab import ROOT
from lab_cluster import LabCluster
from lab_studies import STORE, continual_keys

from ke_ray import __version__, storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def refused(cluster: LabCluster, *words: object, host: str = "h1", **variables: str) -> str:
    """The message of a command on a host, on one line."""
    done = cluster.ke_ray(host, *words, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def continual(cluster: LabCluster, output: str, **keys: Any) -> tuple[str, str]:
    """The words of a study whose file is on the head."""
    study = continual_keys(STORE, output, executor="ray", **keys)
    cluster.lab.hosts["h1"].path(ROOT / "study.yaml").write_text(yaml.safe_dump(study))
    return "continual", "study.yaml"


@contextmanager
def no_route(cluster: LabCluster, name: str, to: str) -> Iterator[None]:
    """A host has no way to another, and is told so at once."""
    host, address = cluster.lab.hosts[name], cluster.lab.hosts[to].address
    assert host.run("ip", "route", "add", "unreachable", address).returncode == 0
    yield
    assert host.run("ip", "route", "del", "unreachable", address).returncode == 0


def test_other_code_on_some_hosts_is_refused_with_both_versions(cluster: LabCluster) -> None:
    edits = {"h2": ("ke_ray/core/__init__.py", b"\n# changed\n")}
    edits["h3"] = ("ke_ray/__init__.py", b"\n__version__ = '0.0.9'\n")
    files = [cluster.lab.hosts[name].path(ROOT / path) for name, (path, _) in edits.items()]
    before = [file.read_bytes() for file in files]
    try:
        for file, content, (_, added) in zip(files, before, edits.values(), strict=True):
            file.write_bytes(content + added)
        said = refused(cluster, *continual(cluster, f"{STORE}/other-code"))
    finally:
        for file, content in zip(files, before, strict=True):
            file.write_bytes(content)
    assert f"This command is ke_ray {__version__} (files " in said
    assert re.search(rf"node 10\.77\.0\.2: ke_ray {re.escape(__version__)} \(files \w+\)", said)
    assert "node 10.77.0.3: ke_ray 0.0.9" in said
    assert "ke-ray submit" in said


def test_a_store_and_a_server_that_a_host_does_not_reach_are_named(cluster: LabCluster) -> None:
    words = continual(cluster, f"{STORE}/unreached")
    with no_route(cluster, "h3", "store"):
        said = refused(cluster, *words)
    assert f"'{STORE}/" in said
    assert "is not reached from the node 10.77.0.3: " in said
    assert "10.77.0.2" not in said
    assert "environment of `ray start`" in said
    with no_route(cluster, "h3", "mlflow"):
        said = refused(cluster, *words)
    assert f"'{cluster.mlflow_uri}' is not reached from the node 10.77.0.3: No route" in said
    assert not storage.exists(f"{STORE}/unreached/runs.parquet")


def test_another_token_is_one_message(cluster: LabCluster) -> None:
    host = cluster.lab.hosts["h2"]
    host.path("/tmp/other").write_text("0" * 64)
    said = refused(
        cluster,
        *("scan", f"{STORE}/series/checkpoints", "--data", f"ids={STORE}/ids.npy"),
        *("--num-instances", 40, "--sequence-length", 24, "--output", f"{STORE}/other-token"),
        host="h2",
        RAY_AUTH_TOKEN_PATH="/tmp/other",
    )
    token_is_refused = f"cluster at RAY_ADDRESS '{cluster.head.gcs}' refuses this command's token"
    assert said.startswith(f"ke-ray: The {token_is_refused}")
    assert "RAY_AUTH_TOKEN_PATH" in said


def test_what_only_the_driver_sees_is_refused(cluster: LabCluster, data: Path) -> None:
    said = refused(cluster, *continual(cluster, "local-output"))
    assert "The output folder 'local-output' lies on the driver's disk, and the node" in said
    head = cluster.lab.hosts["h1"]
    assert not head.path(ROOT / "local-output" / "runs.parquet").exists()
    for path in (data / "series").rglob("*"):
        if path.is_file():
            target = head.path(Path("/tmp") / path.relative_to(data))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    said = refused(
        cluster,
        *("scan", "/tmp/series/checkpoints", "--data", f"ids={STORE}/ids.npy", "--no-mlflow"),
        *("--num-instances", 40, "--sequence-length", 24, "--output", "scan"),
    )
    assert "The checkpoint '/tmp/series/checkpoints/step" in said
    assert "lies on the driver's disk, and the node" in said
