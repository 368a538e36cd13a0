"""A real Prometheus on the head's host, while a scan and a sweep run on two others."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import s3fs
from lab_cluster import BUCKET, LabCluster
from lab_studies import STORE, continual_keys
from prometheus import ABSENT, DASHBOARDS, Prometheus, queries, variables, watch_closely
from servers import Gate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INSTANCES = 4000  # a scorer takes seconds over a checkpoint, so that Prometheus sees it at work
NAMES = ("a_scan", "a_sweep")
_RAYS_OWN = "/tmp/ray/session_latest/metrics/prometheus/prometheus.yml"
_PORT = 9099


@pytest.fixture(scope="module")
def watched(
    three_hosts: LabCluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus, with the configuration that Ray wrote, after a scan and a sweep."""
    if shutil.which("prometheus") is None:
        pytest.skip(ABSENT)
    log = tmp_path_factory.mktemp("watch") / "prometheus.log"
    head = three_hosts.lab.hosts["h1"]
    checked = head.run("promtool", "check", "config", _RAYS_OWN)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    head.path("/tmp/watch.yml").write_text(watch_closely(head.run("cat", _RAYS_OWN).stdout))
    options = ("--config.file=/tmp/watch.yml", "--storage.tsdb.path=/tmp/watch")
    started = time.time()
    head.start(["prometheus", *options, f"--web.listen-address=127.0.0.1:{_PORT}"], log)
    with Gate(_PORT, head.network) as gate:
        deadline = time.monotonic() + 60
        while not _is_ready(gate.uri):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        _scan_and_sweep(three_hosts)
        yield Prometheus(gate.uri, started)


def _is_ready(uri: str) -> bool:
    try:
        return requests.get(f"{uri}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


def _scan_and_sweep(cluster: LabCluster) -> None:
    files = s3fs.S3FileSystem(
        key="lab", secret="lab", endpoint_url=cluster.s3_here["AWS_ENDPOINT_URL"]
    )
    with files.open(f"{BUCKET}/watched.npy", "wb") as file:
        np.save(file, np.random.default_rng(0).integers(2, 300, (INSTANCES, 24), np.uint16))
    scan, sweep = (f"{STORE}/runs/{name}" for name in NAMES)
    study = {
        "kind": "sweep",
        "output": sweep,
        "base": continual_keys(STORE, "runs", executor="ray"),
        "changes": {"resuscitation": {"ratio": 0.5, "factor": 1.0}},
        "space": {"resuscitation.factor": [1, 2]},
        "objectives": ["acquisition", "forgetting"],
        "mlflow": {"enabled": False},
    }
    cluster.lab.hosts["h1"].path("/tmp/sweep.yaml").write_text(json.dumps(study))
    for words in (
        (
            *("scan", f"{STORE}/series/checkpoints", "--data", f"ids={STORE}/watched.npy"),
            *("--num-instances", INSTANCES, "--sequence-length", 24, "--num-actors", 2),
            *("--measures", "knowledge_entropy", "--no-mlflow", "--output", scan),
        ),
        ("sweep", "/tmp/sweep.yaml"),
    ):
        done = cluster.ke_ray("h1", *words)
        assert done.returncode == 0, done.stdout + done.stderr


def with_values(expression: str, values: dict[str, str]) -> str:
    """A dashboard's expression with values for its variables, as Grafana asks it."""
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def test_prometheus_answers_every_query_of_the_dashboards(watched: Prometheus) -> None:
    """All but those of GPUs, where there are none; test_metrics.py has their names checked."""
    scan, sweep = (f'{{study="{name}"}}' for name in NAMES)
    ends = {
        f"sum(ray_ke_ray_scan_checkpoints_total{scan})": 4,
        f"sum(ray_ke_ray_scan_tokens_total{scan})": 4 * INSTANCES * 24,
        f"sum(ray_ke_ray_sweep_trials_total{sweep})": 2,
        f"count(count by (run) (ray_ke_ray_training_tokens_total{sweep}))": 2,
    }
    deadline = time.monotonic() + 60  # for what the commands exported last
    while (seen := {e: watched.last(e) for e in ends}) != ends:
        assert time.monotonic() < deadline, seen
        time.sleep(1)

    has_gpu = bool(watched.label_values("ray_node_gpus_available", "GpuIndex"))
    for path, study in zip(DASHBOARDS, NAMES, strict=True):
        chosen = {"$__rate_interval": "10s", "$study": study}
        for name, (selector, label) in variables(path).items():
            values = watched.label_values(with_values(selector, chosen), label)
            if name == "study":
                assert chosen["$study"] in values
            else:
                chosen[f"${name}"] = "|".join(values)
        for title, expression, legend in queries(path):
            series = watched.history(with_values(expression, chosen))
            if title.startswith("GPU") and not has_gpu:
                assert not series, title
                continue
            values = [value for _, found in series for value in found]
            # A mean per load is 0/0 where all loads fell between two looks.
            assert any(map(math.isfinite, values)) or (values and ") / sum" in expression), (
                expression
            )
            if path.stem == "scan" and title == "Time left":
                assert max(*series[0][1], 0) < 300, "at the speed of the minute that there was"
            for labels, _ in series:
                assert {*re.findall(r"{{(\w+)}}", legend)} <= labels.keys(), (expression, labels)
    for expression in ("ray_node_mem_used", "ray_node_network_receive_speed"):
        assert len(watched.history(expression)) >= 3, "one of each host"
