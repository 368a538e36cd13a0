"""Evaluation shared among workers: the same items and scores as one worker's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_studies import tiny_continual
from tiny_training import run_together, tiny_model

from ke_ray.data.corpus import Corpus
from ke_ray.errors import ConfigError
from ke_ray.evaluation.sharing import PASSES_BETWEEN, Workers, share
from ke_ray.models.loading import load_model
from ke_ray.storage import read_table
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training import export
from ke_ray.training.continual import run_continual
from ke_ray.training.inputs import load_inputs, read_start
from ke_ray.training.parallel import Worker, unwrap, wrap_model
from ke_ray.training.runs import list_runs, part_folder
from ke_ray.training.snapshot import Questions, take_snapshot


def two_workers(output: Path, series: Path, strategy: str, **changes: Any) -> ContinualStudy:
    keys = {"num_workers": 2, "strategy": strategy, "micro_batch_size": 2, "executor": "ray"}
    return tiny_continual(output, series, **{**keys, "keep_final": False, **changes})


def assert_close(ours: Any, theirs: Any) -> None:
    """Numbers to 1e-5, or to float32's rounding where they are large; all else equal."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_close(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=3e-7, nan_ok=True)
    else:
        assert ours == theirs


def first_rows(corpus: Corpus | None, count: int) -> Corpus | None:
    assert corpus is not None
    return dataclasses.replace(
        corpus,
        input_ids=corpus.input_ids[:count],
        lengths=corpus.lengths[:count],
        group_sizes=None,
    )


def inputs_of(study: ContinualStudy) -> tuple[str, Questions]:
    spec = list_runs(study)[-1]
    start = read_start(study, spec.ref, spec.ref.location)
    return spec.ref.location, load_inputs(study, start, 0).questions


def sharded(model: torch.nn.Module) -> list[bool]:
    return [hasattr(parameter, "full_tensor") for parameter in model.parameters()]


def evaluate(worker: Worker, study: ContinualStudy) -> dict[str, Any]:
    """Snapshots on all items and on one of each kind, and the calls of the model."""
    location, questions = inputs_of(study)
    model = load_model(location).requires_grad_(True)
    model = unwrap(wrap_model(model, worker, strategy=study.strategy, precision=study.precision))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.base_model.register_forward_pre_hook(count)
    workers = Workers(worker.rank, worker.world_size)
    every = take_snapshot(model, study, questions, workers=workers).to_json()
    num_calls = calls
    few = dataclasses.replace(
        questions,
        probes=questions.probes[:1],
        held_out=first_rows(questions.held_out, 1),
        entropy=first_rows(questions.entropy, 1),
    )
    assert study.downstream is not None
    downstream = study.downstream.model_copy(update={"limit": 1})
    limited = study.model_copy(update={"downstream": downstream})
    one = take_snapshot(model, limited, few, workers=workers).to_json()
    return {"every": every, "one": one, "calls": num_calls, "sharded": sharded(model)}


def evaluate_all(worker: Worker, studies: dict[str, ContinualStudy]) -> dict[str, Any]:
    return {name: evaluate(worker, study) for name, study in studies.items()}


@pytest.fixture(scope="module")
def alone(series: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(Worker(), tiny_continual(tmp_path_factory.mktemp("alone"), series))


@pytest.fixture(scope="module")
def together(series: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers found, by study."""
    folder = tmp_path_factory.mktemp("together")
    studies = {
        "ddp": two_workers(folder, series, "ddp"),
        "fsdp": two_workers(folder, series, "fsdp"),
        "fsdp in bfloat16": two_workers(folder, series, "fsdp", precision="bfloat16"),
    }
    found = run_together(folder, 2, evaluate_all, studies)
    for each in found:
        assert isinstance(each, dict), each
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_give_the_items_and_scores_of_one(
    strategy: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    first, second = (each[strategy] for each in together)
    assert_close(first["every"], alone["every"])
    assert first["every"] == second["every"], "each has the whole"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fewer_items_than_workers_are_scored_alike(
    strategy: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    first, second = (each[strategy] for each in together)
    assert_close(first["one"], alone["one"])
    assert first["one"] == second["one"]


def test_sharded_workers_pass_in_step_and_keep_their_shards(
    together: list[dict[str, Any]],
) -> None:
    first, second = (each["fsdp"] for each in together)
    assert first["calls"] == second["calls"]
    assert all(first["sharded"])


def test_evaluation_follows_the_precision_of_the_study(
    alone: dict[str, Any], together: list[dict[str, Any]], series: Path, tmp_path: Path
) -> None:
    def knowledge(**changes: Any) -> float:
        study = tiny_continual(tmp_path, series, **changes)
        location, questions = inputs_of(study)
        snapshot = take_snapshot(load_model(location), study, questions)
        assert snapshot.entropy_nats == pytest.approx(alone["every"]["entropy_nats"], abs=0.02)
        assert snapshot.entropy_nats != alone["every"]["entropy_nats"]
        assert snapshot.knowledge is not None
        return snapshot.knowledge

    exact = alone["every"]["knowledge"]
    rounded = knowledge(precision="bfloat16", downstream=None)
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.02)
    assert knowledge(evaluation={"dtype": "bfloat16"}, downstream=None) == rounded
    sharded = together[0]["fsdp in bfloat16"]["every"]
    assert sharded["knowledge"] != exact
    assert sharded["knowledge"] == pytest.approx(exact, abs=0.02)


def test_shards_of_a_bfloat16_study_cannot_be_evaluated_in_float32(
    series: Path, tmp_path: Path
) -> None:
    keys = {"precision": "bfloat16", "evaluation": {"dtype": "float32"}}
    with pytest.raises(ConfigError, match=r"evaluation\.dtype is float32.*leave it out"):
        two_workers(tmp_path, series, "fsdp", **keys)
    assert two_workers(tmp_path, series, "ddp", **keys).evaluation_dtype == "float32"


def deal(worker: Worker, costs: list[int], failing: int) -> list[int]:
    """The passes that a worker made; the pass ``failing`` fails."""
    workers = Workers(worker.rank, worker.world_size)

    def forward(number: int) -> int:
        if number == failing:
            raise ValueError(f"pass {number} failed")
        return number

    model = torch.nn.Linear(1, 1)
    passes = share(range(len(costs)), forward, model, workers, lambda number: costs[number])
    return [number for number, _ in passes]


def deal_own(worker: Worker) -> list[int]:
    return deal(worker, [10, 20, 30 + worker.rank], -1)


def test_workers_with_different_items_are_refused(tmp_path: Path) -> None:
    for found in run_together(tmp_path, 2, deal_own):
        assert "DataError: The workers have different items" in found


def test_workers_share_all_passes_evenly(tmp_path: Path) -> None:
    costs = [3, 50, 1, 40, 2, 30, 20]
    first, second = run_together(tmp_path, 2, deal, costs, -1)
    assert sorted(first + second) == list(range(7))
    loads = [sum(costs[number] for number in own) for own in (first, second)]
    assert abs(loads[0] - loads[1]) <= max(costs)


def test_a_worker_that_fails_ends_the_others_at_their_next_meeting(tmp_path: Path) -> None:
    costs = list(range(4 * PASSES_BETWEEN, 0, -1))  # in this order; worker 1 has the odd ones
    first, second = run_together(tmp_path, 2, deal, costs, 1)
    assert "pass 1 failed" in second
    assert "Worker 1 of 2 failed" in first


def fail_in_a_pass(worker: Worker) -> None:
    model = wrap_model(tiny_model(), worker, strategy="fsdp", precision="float32")

    def forward(number: int) -> None:
        if worker.rank == 1:
            raise ValueError("pass failed")
        model(input_ids=torch.tensor([[1, 2]]))

    workers = Workers(worker.rank, worker.world_size)
    list(share(range(2), forward, model, workers, lambda _: 1))


def test_a_worker_of_a_sharded_model_that_ends_leaves_no_other_waiting(tmp_path: Path) -> None:
    first, second = run_together(tmp_path, 2, fail_in_a_pass)
    assert "pass failed" in second
    assert "Traceback" in first


def run(worker: Worker, study: ContinualStudy) -> dict[str, Any]:
    def gather(*_: object) -> None:
        raise AssertionError("the whole model was gathered")

    export.weight_pieces = gather  # type: ignore[assignment]
    return run_continual(study, list_runs(study)[-1], worker)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_workers_has_the_numbers_of_one(
    strategy: str, series: Path, tmp_path: Path
) -> None:
    keys = {"resuscitation": {"ratio": 0.5, "factor": 2.0}, "downstream": None}
    one = tiny_continual(tmp_path / "one", series, **keys)
    row = run_continual(one, list_runs(one)[-1])
    two = two_workers(tmp_path / "two", series, strategy, **keys)
    found, _ = run_together(tmp_path / "workers", 2, run, two)
    assert isinstance(found, dict), found
    for name in ("acquisition", "knowledge_entropy_after_nats", "perplexity_after"):
        assert found[name] == pytest.approx(row[name], abs=1e-4), name
    tables = [
        read_table(f"{part_folder(study, list_runs(study)[-1])}/probe_items.parquet").to_pandas()
        for study in (one, two)
    ]
    names = ["run", "step", "setting", "instance", "level", "probe", "num_target_tokens"]
    assert (tables[0][names] == tables[1][names]).all().all()
    np.testing.assert_allclose(tables[0]["logprob_summed"], tables[1]["logprob_summed"], atol=1e-4)
