"""Places are counted node by node, and what never fits on a node is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_studies import tiny_pretrain

from ke_ray.engine.cluster.placement import count_places, describe_nodes, most_cpus
from ke_ray.engine.train import trainer as train
from ke_ray.engine.train.trainer import worker_resources
from ke_ray.errors import ConfigError

SMALL_AND_LARGE = [{"CPU": 4.0}, {"CPU": 32.0}]
HEAD_AND_GPU_NODES = [{"memory": 1.0}, *[{"CPU": 8.0, "GPU": 2.0}] * 2]


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpus", "expected"),
    [
        ([{"CPU": 2.0}] * 3, 1, 0, 2),
        ([{"CPU": 2.0}] * 3, 4, 0, 1),
        (SMALL_AND_LARGE, 1, 0, 32),
        (SMALL_AND_LARGE, 2, 0, 16),
        (SMALL_AND_LARGE, 9, 0, 4),
        (HEAD_AND_GPU_NODES, 1, 1, 8),
        (HEAD_AND_GPU_NODES, 4, 1, 4),
        (HEAD_AND_GPU_NODES, 5, 1, 0),
        ([{"CPU": 8.0, "GPU": 2.0}], 2, 0.6, 4),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, 0.6, 0),
        ([{"CPU": 0.5}], 1, 0, 0),
        ([], 1, 0, 0),
    ],
)
def test_cpus_of_a_worker_fit_on_a_node(
    nodes: list[dict[str, float]], num_workers: int, gpus: float, expected: int
) -> None:
    assert most_cpus(nodes, num_workers, gpus) == expected


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), max_size=6),
    num_workers=st.integers(1, 12),
    gpus=st.sampled_from([0, 0.4, 0.5, 1]),
)
def test_all_workers_run_at_once_and_none_could_have_more(
    sizes: list[tuple[int, int]], num_workers: int, gpus: float
) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(count)} for cpus, count in sizes]
    cpus = most_cpus(nodes, num_workers, gpus)
    assert cpus == 0 or count_places(nodes, cpus, gpus) >= num_workers
    assert count_places(nodes, cpus + 1, gpus) < num_workers


def test_equal_nodes_are_described_together() -> None:
    text = describe_nodes([{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0}])
    assert text == "1 node with 8 CPUs and 1 GPU, 2 nodes with 1 CPU, 1 node with 0 CPUs"


@pytest.mark.parametrize(
    ("keys", "nodes", "cpus", "use_gpu"),
    [
        ({}, SMALL_AND_LARGE, 32, False),
        ({"num_workers": 4}, SMALL_AND_LARGE, 8, False),
        ({"num_workers": 4}, HEAD_AND_GPU_NODES, 4, True),
        ({"num_workers": 8, "use_gpu": False}, HEAD_AND_GPU_NODES, 2, False),
        ({"cpus_per_worker": 8, "num_workers": 2}, HEAD_AND_GPU_NODES, 8, True),
    ],
)
def test_a_training_worker_gets_what_the_nodes_can_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys, nodes, cpus, use_gpu
) -> None:
    monkeypatch.setattr(train, "training_nodes", lambda _: nodes)
    monkeypatch.setattr(train, "may_grow", lambda: False)
    found = worker_resources(tiny_pretrain(tmp_path, **keys))
    assert (found.cpus, found.use_gpu) == (cpus, use_gpu)


def test_fewer_gpus_than_workers_are_no_reason_to_train_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "training_nodes", lambda _: HEAD_AND_GPU_NODES)
    monkeypatch.setattr(train, "may_grow", lambda: False)
    with pytest.raises(ConfigError, match=r"8 workers × .*1 GPU.*holds 4.*use_gpu: false"):
        worker_resources(tiny_pretrain(tmp_path, num_workers=8))


def test_workers_that_no_nodes_hold_are_refused_unless_nodes_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "training_nodes", lambda _: [{"CPU": 4.0}] * 4)
    monkeypatch.setattr(train, "may_grow", lambda: False)
    study = tiny_pretrain(tmp_path, num_workers=2, cpus_per_worker=8)
    with pytest.raises(ConfigError, match=r"2 workers × \(8 CPUs\).*4 nodes with 4 CPUs"):
        worker_resources(study)
    monkeypatch.setattr(train, "may_grow", lambda: True)
    assert worker_resources(study).cpus == 8
