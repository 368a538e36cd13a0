"""The shipped jobs over hosts that share nothing: checkpoints and results on S3, MLflow elsewhere.

The job files are the shipped ones, byte for byte, with addresses given as a user gives them. The
studies that they name stand for large ones, and are tiny here.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_head
import s3fs
import yaml
from command_process import Command, start_command
from lab import ROOT, SHIPPED
from lab_cluster import LabCluster
from lab_studies import STORE, continual_keys
from tiny_studies import tiny_pretrain

from ke_ray import storage
from ke_ray.config import validate
from ke_ray.results import ScanFolder
from ke_ray.studies.continual import ContinualStudy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUNS, DATA = f"{STORE}/runs", f"{STORE}/data"
EXPERIMENT = "hosts"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits from: the code, the job files, and tiny studies by the shipped names."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pretrain = tiny_pretrain(Path("runs")).model_dump(
        mode="json", exclude_unset=True, exclude={"mlflow"}
    )
    studies = {
        "olmo_1b": {
            "kind": "scan",
            "checkpoints": {"spec": f"{STORE}/series/checkpoints"},
            "data": {"ids": f"{STORE}/ids.npy"},
            "num_instances": 40,
            "sequence_length": 24,
            "measures": ["knowledge_entropy"],
            "output": "runs",
        },
        "demo_pretrain": pretrain,
        "olmo_1b_pubmed": continual_keys(STORE, "runs", executor="ray", num_workers=2),
        "table1": {
            "kind": "sweep",
            "base": "olmo_1b_pubmed.yaml",
            "changes": {"num_workers": 1},
            "points": [{"checkpoint": 5}, {"checkpoint": 10}],
            "objectives": ["acquisition", "forgetting"],
            "output": "runs",
        },
    }
    studies["olmo_1b_pubmed"]["starts"]["steps"] = "5:10"
    for name, keys in studies.items():
        (folder / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    for job in ("scan", "pretrain", "continual", "sweep"):
        text = (ROOT / "jobs" / f"{job}.yaml").read_bytes()
        assert (folder / "jobs" / f"{job}.yaml").read_bytes() == text
    return folder


def submit(cluster: LabCluster, checkout: Path, job: str, *more: str) -> Command:
    """``ke-ray submit jobs/JOB.yaml`` under way, through a forwarded port, as from a laptop."""
    words = ["submit", f"jobs/{job}.yaml", "--address", cluster.head.address]
    for setting in (f"KE_RAY_RUNS={RUNS}", f"MLFLOW_EXPERIMENT_NAME={EXPERIMENT}"):
        words += ["--set", f"env.{setting}"]
    if job in ("continual", "sweep"):
        words += ["--set", f"env.KE_RAY_DATA={DATA}"]
    words += more
    environment = cluster.head.environment | {"MLFLOW_TRACKING_URI": cluster.mlflow_uri}
    out = cluster.folder / f"{job}.txt"
    out.touch()
    return start_command(words, out, environment=environment, cwd=checkout)


def wait_for(job: Command, text: str) -> None:
    """Until a job that has not ended says so."""
    deadline = time.monotonic() + 200
    while text not in job.stdout:
        assert job.returncode is None, job.stdout
        assert time.monotonic() < deadline, job.stdout
        time.sleep(0.2)


def messages(command: Command) -> str:
    """What a job said, on one line; it has to end well."""
    assert command.wait() == 0, command.stdout
    return " ".join(command.stdout.split())


def statuses(cluster: LabCluster, kind: str) -> list[str]:
    """Of the MLflow runs of a kind."""
    from mlflow import MlflowClient

    client = MlflowClient(cluster.mlflow_here)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = client.search_runs([experiment.experiment_id], f"tags.`ke_ray.kind` = '{kind}'")
    return [run.info.status for run in found]


def list_temporary(output: str) -> list[str]:
    """Files under temporary names, which a finished command leaves none of."""
    names = s3fs.S3FileSystem().find(output)
    return [name for name in names if name.rsplit("/", 1)[1].startswith(".")]


WORKERS = {"10.77.0.2", "10.77.0.3"}
HEAD = {"10.77.0.1"}


def assert_scanned(output: str, data: Path) -> None:
    """The values are those of this process, from local files."""
    import torch

    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_model

    ids = torch.from_numpy(np.load(data / "ids.npy").astype(np.int64))
    rows = [row for row in ScanFolder.open(output).entropy().to_pylist() if row["layer"] is None]
    assert [row["step"] for row in rows] == [0, 2, 5, 10]
    for row in rows:
        model = load_model(str(data / "series" / "checkpoints" / row["checkpoint"]))
        expected = score_model(model, ids, measures=["knowledge_entropy"])
        assert row["value"] == pytest.approx(expected.row("knowledge_entropy").value, rel=1e-5)


def test_a_scan_with_a_scorer_on_each_worker(
    cluster: LabCluster, checkout: Path, data: Path
) -> None:
    said = messages(submit(cluster, checkout, "scan"))
    assert "4 scanned, 0 failed" in said
    assert cluster.addresses_of("CheckpointScorer") == WORKERS
    # Where the command runs: it may not go with another node.
    assert cluster.addresses_of("ScanMonitor") == HEAD

    assert_scanned(f"{RUNS}/olmo_1b", data)
    assert statuses(cluster, "scan") == ["FINISHED"]
    assert not list_temporary(f"{RUNS}/olmo_1b")

    # Ray's own command, into the same folder.
    done = subprocess.run(
        [
            *(ray_head.RAY, "job", "submit", "--address", cluster.head.address),
            *("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml", "--", "python"),
            *("-m", "ke_ray", "scan", "sweeps/olmo_1b.yaml", "--output", f"{RUNS}/olmo_1b"),
            *("--mlflow-uri", cluster.mlflow_uri),
        ],
        cwd=checkout,
        env=cluster.head.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 scanned, 0 failed, 4 skipped (finished before)" in " ".join(done.stdout.split())


def test_a_scan_outlasts_a_cut_of_the_store(
    cluster: LabCluster, checkout: Path, data: Path
) -> None:
    output = f"{STORE}/cut"
    job = submit(cluster, checkout, "scan", "--set", f"env.KE_RAY_RUNS={output}")
    wait_for(job, "scan: 0 done")  # its scorers start, and have fetched nothing
    cluster.lab.cut("store")
    time.sleep(20)
    assert job.returncode is None, job.stdout
    cluster.lab.mend("store")
    assert "4 scanned, 0 failed" in messages(job)
    assert_scanned(f"{output}/olmo_1b", data)
    assert not list_temporary(output)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of continual learning in this process, from local files."""
    from ke_ray.engine.train.continual import run_continual_study

    output = str(tmp_path_factory.mktemp("here"))
    keys = continual_keys(str(data), output, executor="inline")
    keys["starts"]["steps"] = "5:10"
    keys["mlflow"] = {"enabled": False}
    return run_continual_study(validate(ContinualStudy, keys, "here")).rows


def test_continual_learning_with_a_training_worker_on_each_worker(
    cluster: LabCluster, checkout: Path, expected: list[dict[str, Any]]
) -> None:
    messages(submit(cluster, checkout, "continual"))
    assert cluster.addresses_of("RayTrainWorker") == WORKERS

    rows = storage.read_table(f"{RUNS}/olmo_1b_pubmed/runs.parquet").to_pylist()
    assert_equal_runs(rows, expected)
    assert statuses(cluster, "continual") == ["FINISHED"] * 2
    assert not list_temporary(f"{RUNS}/olmo_1b_pubmed")


def assert_equal_runs(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert {row["step"] for row in rows} == {5, 10}
    for row, other in zip(
        *(sorted(each, key=lambda row: row["step"]) for each in (rows, expected)), strict=True
    ):
        for name in ("acquisition", "forgetting", "probe_logprob_after"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_pretraining_waits_for_a_host_that_comes_later(
    cluster: LabCluster, checkout: Path, pretrained: Path
) -> None:
    job = submit(cluster, checkout, "pretrain", "--set", "entrypoint_num_cpus=4")
    wait_for(job, "waits for a node with 4 CPUs free")
    late = cluster.join("h4", "--num-cpus=4", "--num-gpus=1")
    messages(job)
    (submitted,) = cluster.head.jobs("pretrain")
    assert late.address in submitted["driver_agent_http_address"]
    here, there = (
        storage.read_table(f"{folder}/train.parquet").column("loss").to_numpy()
        for folder in (pretrained, f"{RUNS}/pretrain")
    )
    np.testing.assert_allclose(there, here, atol=1e-6)
    assert storage.exists(f"{RUNS}/pretrain/checkpoints/step10/model.safetensors")
    assert statuses(cluster, "pretrain") == ["FINISHED"]
    assert not list_temporary(f"{RUNS}/pretrain")


def test_a_sweep_where_a_host_declares_a_gpu_that_torch_cannot_use(
    cluster: LabCluster, checkout: Path, expected: list[dict[str, Any]]
) -> None:
    if "h4" not in cluster.lab.hosts:
        cluster.join("h4", "--num-cpus=4", "--num-gpus=1")
    said = messages(submit(cluster, checkout, "sweep"))
    assert "Training runs on CPUs" in said
    assert cluster.addresses_of("TrialBook") == HEAD
    trials = storage.read_table(f"{RUNS}/table1/trials.parquet").to_pylist()
    assert [row["status"] for row in trials] == ["ok"] * 2
    assert len({row["mlflow_run_id"] for row in trials}) == 2
    assert_equal_runs(trials, expected)
    assert set(statuses(cluster, "sweep")) == {"FINISHED"}
    assert not list_temporary(f"{RUNS}/table1")
