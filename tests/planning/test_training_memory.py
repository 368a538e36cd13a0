"""Forecasts of training memory against PyTorch's own tracker, on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_studies import tiny_continual, tiny_pretrain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from ke_ray.config import validate
from ke_ray.errors import ConfigError
from ke_ray.models.published import PUBLISHED, published_config
from ke_ray.planning import memory_forecast
from ke_ray.planning.memory_forecast import check_memory, memory_text
from ke_ray.planning.model_sizes import measure_sizes
from ke_ray.planning.training_memory import (
    ModelSizes,
    is_sharded,
    nearest_fit,
    worker_memory,
)
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.training import TrainingSettings
from ke_ray.training import loop, parallel
from ke_ray.training.loss import row_losses
from ke_ray.training.optimizer import build_optimizer
from ke_ray.training.parallel import Worker, unwrap, wrap_model

GIB = 2**30
OLMO_1B, OLMO_7B = "allenai/OLMo-1B-hf", "allenai/OLMo-7B-hf"


class Tracker(MemTracker):
    """Its peaks of every module, which cost minutes, are not looked at."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot["Total"]:
                self._peak_mem[device] = snapshot["Total"]
                self._peak_mem_snap[device] = dict(snapshot)


def settings_of(**keys: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {"output": "unused", "sequence_length": 1024, "precision": "bfloat16", **keys}
    )


def tracked_peak(repo: str, settings: TrainingSettings, patch: pytest.MonkeyPatch) -> int:
    """The most bytes that live at one time in a later step of the loop, on one worker."""
    tracker = Tracker()

    def tracked_losses(*arguments: Any) -> torch.Tensor:
        tracker.reset_mod_stats()  # it takes a second pass for a mistake
        return row_losses(*arguments)

    patch.setattr(loop, "row_losses", tracked_losses)
    worker = Worker(0, settings.num_workers)
    rows = settings.global_batch_size // settings.num_workers
    ids = np.zeros((rows, settings.sequence_length), np.int64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(published_config(repo), dtype=torch.float32)
        loop._prepare(model, settings)
        model = wrap_model(model, worker, strategy=settings.strategy, precision=settings.precision)
        optimizer = build_optimizer(unwrap(model), settings.optimizer)
        for parameter in unwrap(model).parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.track_external(unwrap(model), optimizer)
        with tracker:
            loop._gradients(model, ids, settings, worker, settings.rows_per_forward)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])


@pytest.fixture
def four_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group whose other members do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    mesh = init_device_mesh("cpu", (4,))  # its ranks are numbers, which fake tensors lack
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: mesh)
    yield
    dist.destroy_process_group()


def check(repo: str, settings: TrainingSettings, patch: pytest.MonkeyPatch) -> None:
    memory = worker_memory(sizes_of(repo, settings), settings)
    assert memory.training == pytest.approx(tracked_peak(repo, settings, patch), rel=0.1)


def sizes_of(repo: str, settings: TrainingSettings) -> ModelSizes:
    return measure_sizes(
        published_config(repo),
        sequence_length=settings.sequence_length,
        precision=settings.precision,
        sharded=is_sharded(settings),
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"global_batch_size": 8, "precision": "float32"},
        pytest.param({"global_batch_size": 8, "micro_batch_size": 4}, marks=pytest.mark.slow),
        {"global_batch_size": 8, "micro_batch_size": 4, "activation_checkpointing": True},
    ],
    ids=["float32", "bfloat16", "checkpointing"],
)
def test_a_step_at_olmo_1b_takes_what_is_forecast(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    check(OLMO_1B, settings_of(**keys), monkeypatch)


def test_a_step_at_olmo_7b_takes_what_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    check(OLMO_7B, settings_of(global_batch_size=4), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("repo", [OLMO_1B, OLMO_7B])
def test_a_step_of_a_sharded_model_takes_what_is_forecast(
    monkeypatch: pytest.MonkeyPatch, four_workers: None, repo: str, checkpointing: bool
) -> None:
    keys = {"global_batch_size": 8, "micro_batch_size": 1, "num_workers": 4, "strategy": "fsdp"}
    check(repo, settings_of(**keys, activation_checkpointing=checkpointing), monkeypatch)


@pytest.mark.parametrize("repo", sorted(PUBLISHED))
def test_published_models_have_the_published_number_of_parameters(repo: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published_config(repo), dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[repo][1]


def test_the_nearest_setting_changes_the_cheapest_keys_first() -> None:
    settings = settings_of(global_batch_size=64, num_workers=2, micro_batch_size=32)
    of_strategy = {
        strategy: sizes_of(OLMO_1B, settings.model_copy(update={"strategy": strategy}))
        for strategy in ("ddp", "fsdp")
    }

    def measure(candidate: TrainingSettings) -> ModelSizes:
        return of_strategy[candidate.strategy]

    changed = ("micro_batch_size", "activation_checkpointing", "strategy", "num_workers")

    def nearest(gib: float) -> tuple[object, ...]:
        fit = nearest_fit(settings, measure, gib * GIB)
        assert fit is not None
        assert worker_memory(measure(fit), fit).peak < gib * GIB
        return tuple(getattr(fit, name) for name in changed)

    assert nearest(80) == (16, False, "ddp", 2)
    assert nearest(28) == (2, False, "ddp", 2)
    assert nearest(20) == (4, False, "fsdp", 2)
    assert nearest(9)[2:] == ("fsdp", 4)
    assert nearest_fit(settings, measure, 2 * GIB) is None
    assert nearest_fit(settings, measure, 9 * GIB, may_add_workers=False) is None


def olmo_7b(**keys: Any) -> ContinualStudy:
    values = {
        "starts": {"spec": OLMO_7B},
        "corpus": {"source": "nowhere/*.jsonl.gz"},
        "precision": "bfloat16",
        "output": "unused",
        "num_workers": 8,
        **keys,
    }
    return validate(ContinualStudy, values, "olmo_7b")


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    study = olmo_7b(gpu_memory_gib=80)
    with pytest.raises(ConfigError) as refused:
        check_memory(study)
    message = str(refused.value)
    assert "gpu_memory_gib is 80" in message
    assert "--set strategy=fsdp --set micro_batch_size=8" in message
    check_memory(study.model_copy(update={"strategy": "fsdp", "micro_batch_size": 8}))
    text = memory_text(study)
    for part in ("weights", "gradients", "moments", "activations", "logits", "does not fit"):
        assert part in text
    assert "weights                     25.7 GiB" in text


def test_a_cluster_of_unknown_gpus_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_memory(olmo_7b())
    assert "give gpu_memory_gib" in memory_text(olmo_7b())


def test_this_machines_memory_is_divided_among_its_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    study = tiny_pretrain(tmp_path, num_workers=2, use_gpu=False)
    check_memory(study)
    needed = worker_memory(*_tiny_sizes(study)).peak
    for total, refused in ((2 * needed + 2, False), (2 * needed - 2, True)):
        machine = SimpleNamespace(total=total)
        monkeypatch.setattr(memory_forecast.psutil, "virtual_memory", lambda m=machine: m)
        if refused:
            with pytest.raises(ConfigError, match="for 2 workers"):
                check_memory(study)
        else:
            check_memory(study)


def _tiny_sizes(study: Any) -> tuple[Any, Any]:
    measure = memory_forecast.measure_of(memory_forecast.config_of(study))
    assert measure is not None
    return measure(study), study


def test_a_finished_study_asks_for_no_memory(tmp_path: Path) -> None:
    study = tiny_continual(tmp_path, tmp_path).model_copy(
        update={"starts": olmo_7b().starts, "gpu_memory_gib": 2.0}
    )
    with pytest.raises(ConfigError, match="more memory"):
        check_memory(study)
    (tmp_path / "manifest.json").write_text('{"status": "finished"}')
    check_memory(study)
