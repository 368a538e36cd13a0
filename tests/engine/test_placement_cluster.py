"""Each kind of study on a head without CPUs and two nodes of one CPU that declare a GPU each.

torch has no CUDA here, which a declared GPU does not change.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_head
import torch
from tiny_studies import tiny_continual, tiny_pretrain
from tiny_sweep import tiny_sweep

from ke_ray.storage import read_table
from ke_ray.training.pretrain import run_pretrain

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here"),
]


@dataclass
class Cluster:
    """Its head, and commands whose driver joins it."""

    head: ray_head.Head

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """A command in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "ke_ray", *map(str, arguments)],
            env=self.head.environment | {"RAY_ADDRESS": self.head.gcs} | environment,
            cwd=self.head.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ke_ray(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        """Exit code, output and messages of a command."""
        process = self.start(*arguments, **environment)
        try:
            output, messages = process.communicate(timeout=120)
        finally:
            process.kill()
        return process.returncode, output, " ".join(messages.split())

    def run(self, command: str, study: Any, folder: Path, **environment: str) -> str:
        """Messages of a study's command, which has to end well."""
        code, output, messages = self.ke_ray(command, written(study, folder), **environment)
        assert code == 0, output + messages
        return messages


def written(study: Any, folder: Path) -> Path:
    """The study as a file."""
    path = folder / "study.yaml"
    path.write_text(json.dumps(study.model_dump(mode="json", exclude_unset=True, by_alias=True)))
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        ray_head.running_head(num_cpus=0) as head,
        ray_head.joined_node(head, "one", num_cpus=1, num_gpus=1),
        ray_head.joined_node(head, "two", num_cpus=1, num_gpus=1),
    ):
        yield Cluster(head)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    run_pretrain(tiny_pretrain(folder))
    return folder


def test_a_scan_scores_on_cpus_and_says_so_once(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 300, (40, 24), np.uint16))
    code, output, messages = cluster.ke_ray(
        *("scan", pretrained / "checkpoints", "--data", f"ids={tmp_path / 'ids.npy'}"),
        *("--num-instances", 40, "--sequence-length", 24, "--measures", "knowledge_entropy"),
        *("--output", tmp_path / "scan", "--no-mlflow"),
    )
    assert code == 0, output + messages
    rows = read_table(str(tmp_path / "scan" / "entropy.parquet")).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert messages.count("Ray granted a GPU on the node") == 1
    assert "built without CUDA: this scorer, and others like it, scores on CPUs" in messages


def test_a_continual_study_at_its_defaults(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    study = tiny_continual(
        tmp_path / "out", pretrained, executor="ray", starts={"steps": "10:"}, held_out=None
    )
    messages = cluster.run("continual", study, tmp_path)
    (row,) = read_table(f"{study.output}/runs.parquet").to_pylist()
    assert row["status"] == "ok"
    assert "declares GPUs, but torch" in messages
    assert "training on CPUs" in messages


def test_pretraining_with_a_worker_on_each_node(cluster: Cluster, tmp_path: Path) -> None:
    study = tiny_pretrain(tmp_path / "out", num_workers=2)
    assert "training on CPUs" in cluster.run("pretrain", study, tmp_path)
    assert (tmp_path / "out" / "checkpoints" / "step10" / "model.safetensors").is_file()


def test_trials_of_a_sweep(cluster: Cluster, pretrained: Path, tmp_path: Path) -> None:
    study = tiny_sweep(tmp_path / "out", pretrained, base={"downstream": None})
    assert "training on CPUs" in cluster.run("sweep", study, tmp_path)
    rows = read_table(f"{study.output}/trials.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 3
