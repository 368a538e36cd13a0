"""Workers that train one model measure it together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_training import run_together, tiny_model, tiny_rows

from ke_ray.callbacks import Monitor
from ke_ray.errors import ConfigError, ResultsError, UnsupportedArchitectureError, UserError
from ke_ray.models.scoring import score_model
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.training.parallel import Worker, full_tensor, unwrap, wrap_model

#: Three instances for two workers: one of them has a pass less than the other.
D = tiny_rows(num_instances=3).ids
SETTINGS: dict[str, Any] = {
    **{"every": 2, "tokens_per_step": 4 * 12, "max_share": 1.0, "batch_size": 1},
}


def whole(model: Any) -> Any:
    """A copy with all weights, made by all workers together."""
    copied = tiny_model()
    named = {name.removeprefix("module."): full_tensor(v) for name, v in model.state_dict().items()}
    copied.load_state_dict(named)
    return copied


def measured(
    monitor: Monitor, model: Any, step: int, worker: Worker, fails_at: int | None
) -> dict[str, float]:
    """A measurement; at one step, the second worker cannot make its part of it."""
    if step != fails_at or worker.rank == 0:
        return monitor(model, step)
    broken = unwrap(model).model.layers[1].mlp
    with mock.patch.object(broken, "forward", side_effect=MemoryError):
        return monitor(model, step)


def steps(
    worker: Worker, strategy: Any, monitor: Monitor | None, fails_at: int | None = None
) -> dict[str, Any]:
    """Four steps; what was logged, what one worker finds on the same weights, the final ones."""
    model = wrap_model(tiny_model(), worker, strategy=strategy, precision="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logged, expected = [], []
    for step in range(5):
        if step:
            rows = torch.from_numpy(tiny_rows(seed=2).ids[4 * step + worker.rank :][:2]).long()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None and (metrics := measured(monitor, model, step, worker, fails_at)):
            logged.append(metrics["knowledge_entropy/total_nats"])
        if monitor is not None and step % 2 == 0:
            expected.append(score_model(whole(model), D).row("knowledge_entropy").value)
    if monitor is not None:
        monitor.close()
    final = [weight.tolist() for weight in whole(model).parameters()]
    return {"logged": logged, "expected": expected, "final": final}


def refusals(worker: Worker, folder: str) -> list[str]:
    """What each worker is told, of a model that the others measure too."""
    sharded = wrap_model(tiny_model(), worker, strategy="fsdp", precision="float32")
    told = []
    for measures, step, model in (
        (["loss", "knowledge_entropy"], 0, sharded),
        (["knowledge_entropy"], 0, sharded),  # the folder holds a run, which the first worker sees
        (["knowledge_entropy"], 2, half_sharded(worker)),
    ):
        monitor = Monitor(D, folder, measures=measures, **SETTINGS)
        try:
            monitor.start(model, step)
        except (ConfigError, ResultsError, UnsupportedArchitectureError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def refusal_in_the_pass(worker: Worker, folder: str) -> str:
    """What a worker is told of a measure that only a pass shows cannot be had, of one instance."""
    model = wrap_model(tiny_model(), worker, strategy="ddp", precision="float32")
    monitor = Monitor(D[:1], folder, **SETTINGS)
    with mock.patch.object(unwrap(model).model.layers[1].mlp, "forward", side_effect=UserError):
        try:
            monitor(model, 0)
        except UserError as error:
            return type(error).__name__
    return "none"


def half_sharded(worker: Worker) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    return model


def work(worker: Worker, folder: str) -> dict[str, Any]:
    found = {}
    for strategy in ("ddp", "fsdp"):
        monitor = Monitor(D, f"{folder}/{strategy}", **SETTINGS)
        found[strategy] = steps(worker, strategy, monitor)
        found[f"{strategy} alone"] = steps(worker, strategy, None)
    monitor = Monitor(D, f"{folder}/failing", **SETTINGS)
    found["failing"] = steps(worker, "ddp", monitor, fails_at=2)
    found["refusal in the pass"] = refusal_in_the_pass(worker, f"{folder}/refused")
    found["refusals"] = refusals(worker, f"{folder}/fsdp")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    results = run_together(folder / "work", 2, work, str(folder))
    for each in results:
        assert isinstance(each, dict), each
    return results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_values_are_those_of_one_worker(
    found: list[dict[str, Any]], folder: Path, strategy: str
) -> None:
    first, second = (each[strategy] for each in found)
    assert first["logged"] == pytest.approx(first["expected"], rel=1e-6)
    assert (len(first["logged"]), second["logged"]) == (3, [])
    rows = ScanFolder.open(str(folder / strategy)).entropy().to_pylist()
    totals = [row["value"] for row in rows if row["layer"] is None]
    assert totals == first["logged"]
    assert {row["num_instances"] for row in rows} == {3}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_trained_weights_are_the_same_to_the_bit(
    found: list[dict[str, Any]], strategy: str
) -> None:
    for each in found:
        assert each[strategy]["final"] == each[f"{strategy} alone"]["final"]
    assert found[0]["ddp"]["final"] != [
        w.tolist() for w in copy.deepcopy(tiny_model()).parameters()
    ]


def test_training_goes_on_where_a_worker_cannot_measure(
    found: list[dict[str, Any]], folder: Path
) -> None:
    for each in found:
        assert each["failing"]["final"] == each["ddp alone"]["final"]
    first, whole = found[0]["failing"]["logged"], found[0]["ddp"]["logged"]
    assert first == [whole[0], whole[2]]
    rows = ScanFolder.open(str(folder / "failing")).entropy().to_pylist()
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert (failed["step"], "Worker 1 of 2 failed" in failed["error"]) == (2, True)


def test_a_worker_without_a_pass_is_refused_like_the_others(found: list[dict[str, Any]]) -> None:
    assert [each["refusal in the pass"] for each in found] == ["UserError", "UserError"]


def test_all_workers_refuse_together(found: list[dict[str, Any]]) -> None:
    first, second = (each["refusals"] for each in found)
    assert first[0] == second[0]
    assert "loss cannot be measured while weights are sharded" in first[0]
    assert "holds the measurements of another run" in first[1]
    assert "Worker 0 of 2" in second[1]
    assert first[2] == second[2]
    assert "call fully_shard on its layers, then on it" in first[2]
