"""A tiny checkpoint series, its data, and one Ray session for the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ke_ray.studies.scan import ScanStudy


def make_checkpoint(folder: Path, seed: int) -> Path:
    """A random two-layer OLMo in Hugging Face layout."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(seed)
    config = OlmoConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = OlmoForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(torch.randn(48, 1).exp() * (1 + seed / 10))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints ``step10`` … ``step40``."""
    folder = tmp_path_factory.mktemp("series")
    for number in range(1, 5):
        make_checkpoint(folder / f"step{number * 10}", seed=number)
    return folder


@pytest.fixture(scope="session")
def token_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 instances of 24 token ids."""
    path = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(2, 128, (70, 24)).astype(np.uint16))
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray session of two CPUs, shared by the tests of a run."""
    from worker_server import use_worker_server

    from ke_ray.engine.cluster.session import ray_session

    use_worker_server()
    os.environ.pop("RAY_ADDRESS", None)
    with ray_session(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def scan() -> Callable[[ScanStudy], Any]:
    """Runs a scan study in the tests' Ray session."""

    def run(study: ScanStudy) -> Any:
        from ke_ray.engine.scan.run import run_scan
        from ke_ray.outcomes import Display
        from ke_ray.planning.scan import prepare_scan
        from ke_ray.tracking.tracker import open_tracker

        with open_tracker(study.mlflow) as tracker:
            return run_scan(prepare_scan(study), Display(), tracker)

    return run


def make_study(series: Path, token_ids: Path, output: Path, **keys: Any) -> ScanStudy:
    """A scan study of the tiny series; keywords replace keys."""
    values: dict[str, Any] = {
        "checkpoints": {"spec": str(series)},
        "data": {"ids": str(token_ids)},
        "num_instances": 70,
        "sequence_length": 24,
        "num_actors": 1,  # a second one imports torch and transformers for another 3 seconds
        "output": str(output),
        "mlflow": {"enabled": False},
    }
    return ScanStudy.model_validate(values | keys)


@pytest.fixture
def scan_study(series: Path, token_ids: Path, tmp_path: Path) -> Callable[..., ScanStudy]:
    """Makes a scan study of the tiny series; keywords replace keys."""

    def make(*, output: str | Path = tmp_path / "scan", **keys: Any) -> ScanStudy:
        return make_study(series, token_ids, Path(output), **keys)

    return make
