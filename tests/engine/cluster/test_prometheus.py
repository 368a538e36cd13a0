"""A real Prometheus beside a cluster of two nodes, while a scan and a sweep run on both."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray_head
from command_process import start_command
from prometheus import ABSENT, DASHBOARDS, Prometheus, queries, running_prometheus, variables
from tiny_studies import write_study
from tiny_sweep import tiny_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INSTANCES = 2000  # a scorer takes seconds over a checkpoint, so that Prometheus sees it at work


@dataclass
class Watched:
    """Result folders of a scan and a sweep, and who watched."""

    prometheus: Prometheus
    scan: Path
    sweep: Path


@pytest.fixture(scope="module")
def watched(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    ids = np.random.default_rng(0).integers(2, 300, (INSTANCES, 24), np.uint16)
    np.save(folder / "ids.npy", ids)
    sweep = tiny_sweep(folder / "a_sweep", pretrained, space={"resuscitation.factor": [1, 2]})
    commands = (
        (
            *("scan", pretrained / "checkpoints", "--data", f"ids={folder / 'ids.npy'}"),
            *("--num-instances", INSTANCES, "--sequence-length", 24, "--num-actors", 2),
            *("--measures", "knowledge_entropy", "--no-mlflow", "--output", folder / "a_scan"),
        ),
        ("sweep", write_study(sweep, folder / "sweep.yaml")),
    )
    # Metrics ten times as often as Ray's default, for runs of seconds.
    often = {"RAY_metrics_report_interval_ms": "1000"}
    with (
        ray_head.running_head(num_cpus=1, settings=often) as head,
        ray_head.joined_node(head, "other", num_cpus=1),
        running_prometheus(head.folder / "ray", folder / "watch") as prometheus,
    ):
        if prometheus is None:
            pytest.skip(ABSENT)
        environment = head.environment | {"RAY_ADDRESS": head.gcs}
        for words in commands:
            command = start_command(
                words, folder / f"{words[0]}.txt", environment=environment, cwd=folder
            )
            assert command.wait() == 0, command.stdout
        yield Watched(prometheus, folder / "a_scan", folder / "a_sweep")


def with_values(expression: str, values: dict[str, str]) -> str:
    """A dashboard's expression with values for its variables, as Grafana asks it."""
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def test_prometheus_answers_every_query_of_the_dashboards(watched: Watched) -> None:
    """All but those of GPUs, where there are none; test_metrics.py has their names checked."""
    prometheus = watched.prometheus
    scan, sweep = (f'{{study="{output.name}"}}' for output in (watched.scan, watched.sweep))
    ends = {
        f"sum(ray_ke_ray_scan_checkpoints_total{scan})": 4,
        f"sum(ray_ke_ray_scan_tokens_total{scan})": 4 * INSTANCES * 24,
        f"sum(ray_ke_ray_sweep_trials_total{sweep})": 2,
        f"count(count by (run) (ray_ke_ray_training_tokens_total{sweep}))": 2,
    }
    deadline = time.monotonic() + 60  # for what the commands exported last
    while (seen := {e: prometheus.last(e) for e in ends}) != ends:
        assert time.monotonic() < deadline, seen
        time.sleep(1)

    has_gpu = bool(prometheus.label_values("ray_node_gpus_available", "GpuIndex"))
    for path, output in zip(DASHBOARDS, (watched.scan, watched.sweep), strict=True):
        chosen = {"$__rate_interval": "10s", "$study": output.name}
        for name, (selector, label) in variables(path).items():
            values = prometheus.label_values(with_values(selector, chosen), label)
            if name == "study":
                assert chosen["$study"] in values
            else:
                chosen[f"${name}"] = "|".join(values)
        for title, expression, legend in queries(path):
            series = prometheus.history(with_values(expression, chosen))
            if title.startswith("GPU") and not has_gpu:
                assert not series, title
                continue
            assert any(math.isfinite(v) for _, found in series for v in found), expression
            if path.stem == "scan" and title == "Time left":
                assert max(*series[0][1], 0) < 300, "at the speed of the minute that there was"
            for labels, _ in series:
                assert {*re.findall(r"{{(\w+)}}", legend)} <= labels.keys(), (expression, labels)
    for expression in ("ray_node_mem_used", "ray_node_network_receive_speed"):
        assert len(prometheus.history(expression)) == 2, "one of each node"
