"""The loop on Ray Train: the same weights with and without Ray, and after a worker was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_studies import tiny_pretrain

from ke_ray import storage
from ke_ray.engine.train.trainer import ProgressFile, run_pretrain_on_ray, worker_resources
from ke_ray.errors import ConfigError, NonFiniteLossError, ResultsError
from ke_ray.storage import read_table
from ke_ray.studies.training import PretrainStudy
from ke_ray.training.loop import Progress, StepRecord
from ke_ray.training.pretrain import run_pretrain


def alone(study: PretrainStudy) -> PretrainStudy:
    """``study`` in this process, with as many threads as a worker of one CPU has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_pretrain(study)
    finally:
        torch.set_num_threads(threads)
    return study


def losses(study: PretrainStudy) -> np.ndarray:
    return np.array(read_table(f"{study.output}/train.parquet").column("loss").to_pylist())


def weights(study: PretrainStudy, step: int) -> bytes:
    return Path(study.output, "checkpoints", f"step{step}", "model.safetensors").read_bytes()


def test_progress_reaches_the_reader_whole(tmp_path: Path) -> None:
    file = ProgressFile(str(tmp_path / "progress.json"))
    assert file.read() is None
    record = StepRecord(3, 300, 1.5, 0.1, 0.9, 50.0, 6.0)
    file.write(Progress(record, 10, 14.0), run="a")
    file.write(Progress(record, 99, 1.0))  # a moment later: left out
    found = file.read()
    assert found is not None
    assert found["num_steps"] == 10
    assert found["record"]["loss"] == 1.5
    assert (found["run"], found["pid"]) == ("a", os.getpid())
    assert storage.absolute("runs/x") == str(Path.cwd() / "runs/x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    tmp_path: Path, ray_cluster: None
) -> None:
    keys = {"num_steps": 120, "save_every": 10, "micro_batch_size": 1, "cpus_per_worker": 1}
    expected = alone(tiny_pretrain(tmp_path / "alone", **keys))
    study = tiny_pretrain(tmp_path / "killed", **keys)
    states = Path(study.output, "state")
    pids: list[int] = []

    def kill() -> None:
        file = ProgressFile(str(Path(study.output, "ray", "progress.json")))
        while not list(states.glob("step000000[3-9]0/state.json")):
            time.sleep(0.02)
        found = file.read()
        assert found is not None
        pids.append(found["pid"])
        os.kill(found["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seen: set[int] = set()
    outcome = run_pretrain_on_ray(study, lambda progress: seen.add(progress.record.step))
    assert pids, "the run ended before its worker could be killed"
    assert outcome.num_done == 1
    assert weights(study, 120) == weights(expected, 120)
    np.testing.assert_array_equal(losses(study), losses(expected))
    assert seen
    assert run_pretrain_on_ray(study).num_skipped == 1


@pytest.mark.ray
def test_two_workers_follow_one(tmp_path: Path, ray_cluster: None) -> None:
    expected = alone(tiny_pretrain(tmp_path / "one"))
    study = tiny_pretrain(tmp_path / "two", num_workers=2, micro_batch_size=2)
    run_pretrain_on_ray(study)
    np.testing.assert_allclose(losses(study), losses(expected), atol=1e-5)


@pytest.mark.ray
def test_errors_of_workers_arrive_as_they_were_raised(tmp_path: Path, ray_cluster: None) -> None:
    optimizer = {"learning_rate": 1e18, "max_grad_norm": None}
    study = tiny_pretrain(tmp_path, optimizer=optimizer, schedule={"warmup_steps": 0})
    with pytest.raises(NonFiniteLossError, match=r"at step \d+, batch"):
        run_pretrain_on_ray(study)
    assert (tmp_path / "checkpoints" / "step0" / "config.json").is_file()
    changed = tiny_pretrain(tmp_path, num_steps=11)
    with pytest.raises(ResultsError, match="num_steps was"):
        run_pretrain_on_ray(changed)
    with pytest.raises(ConfigError, match="the cluster has 1 node with 2 CPUs and holds 2"):
        worker_resources(tiny_pretrain(tmp_path, num_workers=4))
