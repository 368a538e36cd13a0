"""Work over two nodes that share nothing but URIs: an S3 store, and MLflow behind HTTP.

The second node runs in a mount namespace of its own, where the tests' folders are empty and the
driver's working folder does not exist.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_head
import s3fs
from command_process import Command, run_command
from prometheus import ABSENT, DASHBOARDS, Prometheus, queries, running_prometheus, variables
from servers import running_s3

from ke_ray import storage
from ke_ray.config import validate
from ke_ray.results import ScanFolder
from ke_ray.studies.continual import ContinualStudy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
EXPERIMENT = "two nodes"
INSTANCES = 2000  # a scorer takes seconds over a checkpoint, so that Prometheus sees it at work


@dataclass
class TwoNodes:
    """A head and another node, one CPU each, and what they share."""

    head: Any
    folder: Path
    environment: dict[str, str]
    mlflow_uri: str
    prometheus: Prometheus | None = None  # watches all that runs here, where it is installed

    def ke_ray(self, *arguments: object) -> Command:
        """A command whose driver joins the cluster, in a folder that the other node has not."""
        return run_command(
            arguments, self.folder, environment=self.environment, cwd=self.folder, timeout_s=400
        )

    def nodes_of(self, class_name: str) -> set[str]:
        """The nodes on which actors of a class were, dead ones included."""
        found = self.head.get("/api/v0/actors?detail=1&limit=1000", self.head.token).json()
        return {
            actor["node_id"]
            for actor in found["data"]["result"]["result"]
            if class_name in actor["class_name"] and actor["node_id"]
        }

    def statuses(self, kind: str) -> list[str]:
        """Of the MLflow runs of a kind, oldest first."""
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow_uri)
        ids = [client.get_experiment_by_name(EXPERIMENT).experiment_id]
        found = client.search_runs(ids, f"tags.`ke_ray.kind` = '{kind}'", order_by=["start_time"])
        return [run.info.status for run in found]

    def alive(self, *, head_only: bool = False) -> set[str]:
        """The nodes that are up."""
        found = self.head.get("/api/v0/nodes", self.head.token).json()["data"]["result"]["result"]
        return {
            node["node_id"]
            for node in found
            if node["state"] == "ALIVE" and (node["is_head_node"] or not head_only)
        }


def hiding(folder: Path) -> list[str]:
    """A prefix under which ``folder`` is empty and private."""
    script = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(folder)]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory, mlflow_server: str) -> Iterator[TwoNodes]:
    hidden = tmp_path_factory.getbasetemp()
    if subprocess.run([*hiding(hidden), "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces need root: `unshare --mount` was refused")
    folder = tmp_path_factory.mktemp("nodes")
    (agent,) = ray_head.free_ports(1)
    with running_s3(folder) as variables:
        variables = variables | {"HOME": str(folder)}  # caches: the other node's is empty
        kept = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)  # the nodes inherit them, and so do fsspec's calls here
        try:
            # Metrics ten times as often as Ray's default, for runs of seconds.
            often = {"RAY_metrics_report_interval_ms": "1000"}
            with ray_head.running_head(num_cpus=1, settings=often) as head:
                other = [
                    *hiding(hidden),
                    *(ray_head.RAY, "start", "--block", "--address", head.gcs, "--num-cpus", "1"),
                    *("--node-ip-address", "127.0.0.1", "--object-store-memory", "150000000"),
                    *("--dashboard-agent-listen-port", str(agent), "--disable-usage-stats"),
                ]
                with ray_head.node(other, head, head.folder / "other.log"):
                    environment = {
                        **head.environment,
                        "RAY_ADDRESS": head.gcs,
                        "MLFLOW_TRACKING_URI": mlflow_server,
                        "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
                    }
                    cluster = TwoNodes(head, folder, environment, mlflow_server)
                    deadline = time.monotonic() + 120
                    while len(cluster.alive()) < 2:
                        assert time.monotonic() < deadline, (head.folder / "other.log").read_text()
                        time.sleep(0.5)
                    with running_prometheus(head.folder / "ray", folder / "watch") as prometheus:
                        cluster.prometheus = prometheus
                        yield cluster
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def on_s3(two_nodes: TwoNodes, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny pretrained series with its world at ``s3://shared/series``; local copy beside."""
    folder = shutil.copytree(pretrained, tmp_path_factory.mktemp("series") / "copy")
    files = s3fs.S3FileSystem()
    for part in ("checkpoints", "world"):
        files.put(str(folder / part), f"shared/series/{part}", recursive=True)
    ids = np.random.default_rng(0).integers(2, 300, (INSTANCES, 24), np.uint16)
    np.save(folder / "ids.npy", ids)
    files.put(str(folder / "ids.npy"), "shared/series/ids.npy")
    return str(folder)


def continual_keys(place: str, output: str, **changes: Any) -> dict[str, Any]:
    """The tiny continual study with everything it reads at ``place``."""
    from tiny_studies import tiny_continual

    keys = {"executor": "ray", "held_out": None, "keep_final": False, **changes}
    study = tiny_continual(Path("OUTPUT"), Path("PLACE"), **keys)
    text = json.dumps(study.model_dump(mode="json", exclude_unset=True, exclude={"mlflow"}))
    return json.loads(text.replace("PLACE", place).replace("OUTPUT", output))


def list_temporary(output: str) -> list[str]:
    """Files under temporary names, which a finished command leaves none of."""
    names = s3fs.S3FileSystem().find(output)
    return [name for name in names if name.rsplit("/", 1)[1].startswith(".")]


def here(tmp_path: Path, series: str, **changes: Any) -> list[dict[str, Any]]:
    """The rows of the same study in this process, from local files."""
    from ke_ray.engine.train.continual import run_continual_study

    keys = continual_keys(series, str(tmp_path / "here"), **changes) | {
        "executor": "inline",
        "mlflow": {"enabled": False},
    }
    return run_continual_study(validate(ContinualStudy, keys, "here")).rows


@pytest.fixture(scope="module")
def scanned(two_nodes: TwoNodes, on_s3: str) -> str:
    """The results of a submitted scan, for which both nodes scored."""
    output = "s3://shared/scan"
    job = {
        "kind": "job",
        "name": "spread",
        "entrypoint": (
            "python -m ke_ray scan s3://shared/series/checkpoints "
            "--data ids=s3://shared/series/ids.npy --sequence-length 24 "
            f"--num-instances {INSTANCES} "
            f"--measures knowledge_entropy --num-actors 2 --output {output}"
        ),
        "env": {
            "MLFLOW_TRACKING_URI": two_nodes.mlflow_uri,
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
        },
        "working_dir": str(ROOT),
        "runtime_env": str(ROOT / "jobs" / "runtime_env.yaml"),
    }
    # A scan this small may be over before its second scorer is up: then the next one shows it.
    for attempt in range(3):
        keys = job | {"entrypoint": job["entrypoint"].replace(output, f"{output}-{attempt}")}
        (two_nodes.folder / "job.yaml").write_text(json.dumps(keys))
        result = two_nodes.ke_ray("submit", "job.yaml", "--address", two_nodes.head.address)
        assert result.returncode == 0, result.stdout + result.stderr
        if two_nodes.nodes_of("CheckpointScorer") == two_nodes.alive():
            break
    assert two_nodes.nodes_of("CheckpointScorer") == two_nodes.alive()
    return f"{output}-{attempt}"


SWEPT = {"starts": {"steps": "10:"}, "resuscitation": {"ratio": 0.5, "factor": 1.0}}


@pytest.fixture(scope="module")
def swept(two_nodes: TwoNodes, on_s3: str) -> str:
    """The results of ``sweep.yaml``: ``SWEPT``, as it is and with twice the factor."""
    output = "s3://shared/sweep"
    study = {
        "kind": "sweep",
        "output": output,
        "base": continual_keys("s3://shared/series", output, **SWEPT),
        "space": {"resuscitation.factor": [2]},
        "points": [{"resuscitation": None}],
        "objectives": ["acquisition", "forgetting"],
    }
    (two_nodes.folder / "sweep.yaml").write_text(json.dumps(study))
    result = two_nodes.ke_ray("sweep", "sweep.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def test_a_submitted_scan(two_nodes: TwoNodes, on_s3: str, scanned: str) -> None:
    # Where the command runs: it may not go with another node.
    assert two_nodes.nodes_of("ScanMonitor") == two_nodes.alive(head_only=True)

    import torch

    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_model

    ids = torch.from_numpy(np.load(f"{on_s3}/ids.npy").astype(np.int64))
    rows = [row for row in ScanFolder.open(scanned).entropy().to_pylist() if row["layer"] is None]
    assert [row["step"] for row in rows] == [0, 2, 5, 10]
    for row in (rows[0], rows[-1]):
        model = load_model(f"{on_s3}/checkpoints/{row['checkpoint']}")
        expected = score_model(model, ids, measures=["knowledge_entropy"])
        assert row["value"] == pytest.approx(expected.row("knowledge_entropy").value, rel=1e-5)
    assert set(two_nodes.statuses("scan")) == {"FINISHED"}


def test_a_continual_study_with_a_worker_on_each_node(
    two_nodes: TwoNodes, on_s3: str, tmp_path: Path
) -> None:
    output = "s3://shared/continual"
    study = continual_keys("s3://shared/series", output, num_workers=2, starts={"steps": "10:"})
    (two_nodes.folder / "continual.yaml").write_text(json.dumps(study))
    result = two_nodes.ke_ray("continual", "continual.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert two_nodes.nodes_of("RayTrainWorker") == two_nodes.alive()

    (row,) = storage.read_table(f"{output}/runs.parquet").to_pylist()
    (expected,) = here(tmp_path, on_s3, starts={"steps": "10:"})
    for name in ("acquisition", "forgetting", "probe_logprob_after", "num_tokens"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert two_nodes.statuses("continual")[-1] == "FINISHED"
    assert not list_temporary(output)


def test_a_sweep_over_both_nodes(
    two_nodes: TwoNodes, on_s3: str, swept: str, tmp_path: Path
) -> None:
    assert two_nodes.nodes_of("ImplicitFunc") == two_nodes.alive()
    assert two_nodes.nodes_of("TrialBook") == two_nodes.alive(head_only=True)

    trials = storage.read_table(f"{swept}/trials.parquet").to_pylist()
    assert [row["status"] for row in trials] == ["ok"] * 2
    assert len({row["mlflow_run_id"] for row in trials}) == 2
    (doubled,) = (row for row in trials if row["resuscitation.factor"] == 2)
    doubled_keys = SWEPT | {"resuscitation": {"ratio": 0.5, "factor": 2.0}}
    (expected,) = here(tmp_path, on_s3, **doubled_keys)
    for name in ("acquisition", "acquisition_vs_original", "knowledge_entropy_before_nats"):
        assert doubled[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert set(two_nodes.statuses("sweep")) == {"FINISHED"}

    again = two_nodes.ke_ray("sweep", "sweep.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert storage.read_table(f"{swept}/trials.parquet").to_pylist() == trials
    assert not list_temporary(swept)


def with_values(expression: str, values: dict[str, str]) -> str:
    """A dashboard's expression with values for its variables, as Grafana asks it."""
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def test_prometheus_answers_every_query_of_the_dashboards(
    two_nodes: TwoNodes, scanned: str, swept: str
) -> None:
    """All but those of GPUs, where there are none; test_metrics.py has their names checked."""
    prometheus = two_nodes.prometheus
    if prometheus is None:
        pytest.skip(ABSENT)
    scan, sweep = (f'{{study="{Path(output).name}"}}' for output in (scanned, swept))
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
    for path, output in zip(DASHBOARDS, (scanned, swept), strict=True):
        chosen = {"$__rate_interval": "10s", "$study": Path(output).name}
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


def test_what_only_the_driver_sees_is_refused_at_once(two_nodes: TwoNodes, on_s3: str) -> None:
    refused = "lies on the driver's disk, and the node"
    scan = two_nodes.ke_ray(
        *("scan", f"{on_s3}/checkpoints", "--data", f"ids={on_s3}/ids.npy", "--output", "local"),
        *("--num-instances", 40, "--sequence-length", 24, "--no-mlflow"),
    )
    assert scan.returncode == 2, scan.stdout + scan.stderr
    assert "The checkpoint" in scan.stderr
    assert refused in " ".join(scan.stderr.split())

    study = continual_keys("s3://shared/series", "local-output", starts={"steps": "10:"})
    (two_nodes.folder / "local.yaml").write_text(json.dumps(study))
    continual = two_nodes.ke_ray("continual", "local.yaml", "--set", "mlflow.enabled=false")
    assert continual.returncode == 2, continual.stdout + continual.stderr
    assert "The output folder 'local-output'" in continual.stderr
    assert refused in " ".join(continual.stderr.split())
    assert not (two_nodes.folder / "local-output" / "runs.parquet").exists()


def test_an_mlflow_store_that_only_the_driver_sees_is_refused_before_training(
    two_nodes: TwoNodes, on_s3: str
) -> None:
    study = continual_keys("s3://shared/series", "s3://shared/untracked", starts={"steps": "10:"})
    (two_nodes.folder / "untracked.yaml").write_text(json.dumps(study))
    database = two_nodes.folder / "own.db"
    result = two_nodes.ke_ray(
        "continual", "untracked.yaml", "--mlflow-uri", f"sqlite:///{database}"
    )
    assert result.returncode == 2, result.stdout + result.stderr
    message = " ".join(result.stderr.split())
    assert re.search(r"is not reached from the node [0-9.]+", message), message
    assert f"there is no file {database}" in message
    assert not storage.exists("s3://shared/untracked/runs.parquet")
