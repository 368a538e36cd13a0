"""The loop on Ray Train: the same weights with and without Ray, and after a worker was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from tiny_studies import tiny_pretrain

from ke_ray import storage
from ke_ray.engine.train.trainer import (
    ProgressFile,
    _explain,
    build_trainer,
    run_pretrain_on_ray,
    worker_resources,
)
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


def test_the_worker_that_failed_is_blamed_and_not_one_that_noticed() -> None:
    error = RuntimeError("workers failed")
    error.worker_failures = {  # type: ignore[attr-defined]
        0: "Traceback\nRuntimeError: Worker 1 of 2 failed in its part of an evaluation; its own …",
        1: "Traceback\nOutOfMemoryError: no memory",
    }
    assert _explain(error, 3).endswith("the last time: OutOfMemoryError: no memory")


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    tmp_path: Path, ray_cluster: None
) -> None:
    keys = {"num_steps": 60, "save_every": 5, "micro_batch_size": 1, "cpus_per_worker": 1}
    expected = alone(tiny_pretrain(tmp_path / "alone", **keys))
    study = tiny_pretrain(tmp_path / "killed", **keys)
    states = Path(study.output, "state")
    pids: list[int] = []

    def kill() -> None:
        file = ProgressFile(str(Path(study.output, "ray", "progress.json")))
        while not list(states.glob("step000000[1-5]0/state.json")):
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
    assert weights(study, 60) == weights(expected, 60)
    np.testing.assert_array_equal(losses(study), losses(expected))
    assert seen
    assert run_pretrain_on_ray(study).num_skipped == 1
    actors = {actor["ActorClassName"] for actor in ray._private.state.actors().values()}
    assert "RayTrainWorker" in actors
    assert "PreemptionWatcher" not in actors, "nothing of ours listens to it"


@pytest.mark.ray
def test_rays_own_processes_learn_nothing_of_the_study(tmp_path: Path, ray_cluster: None) -> None:
    """They would import torch and transformers for it, and Ray writes it down."""
    study = tiny_pretrain(tmp_path)
    trainer = build_trainer(alone, study, study, str(tmp_path), "name")
    shown = cloudpickle.dumps((trainer.train_run_context, trainer._create_default_callbacks()))
    assert b"ke_ray" not in shown.replace(str(tmp_path).encode(), b"")


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
