"""Work items cover every instance exactly once, with few loads, whatever the numbers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.planning.scan_items import CheckpointWork, CorpusWork, load_tokens, makespan, plan_items

HERE = load_tokens(gpu=False, fetched=False)


def make_works(num_checkpoints: int, sizes: list[int], sequence_length: int = 2048):
    corpora = tuple(
        CorpusWork(f"c{i}", ("knowledge_entropy",), size, sequence_length)
        for i, size in enumerate(sizes)
    )
    return [CheckpointWork(index, corpora) for index in range(num_checkpoints)]


@given(
    num_checkpoints=st.integers(1, 40),
    num_actors=st.integers(1, 17),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=3),
)
def test_every_instance_is_covered_exactly_once(num_checkpoints, num_actors, sizes):
    items = plan_items(make_works(num_checkpoints, sizes), num_actors, HERE)
    covered = Counter(
        (item.checkpoint, rows.work.corpus, instance)
        for item in items
        for rows in item.ranges
        for instance in range(rows.start, rows.stop)
    )
    assert set(covered.values()) == {1}
    assert len(covered) == num_checkpoints * sum(sizes)
    assert [item.index for item in items] == list(range(len(items)))


@given(
    num_checkpoints=st.integers(1, 60),
    num_actors=st.integers(1, 20),
    gpu=st.booleans(),
    fetched=st.booleans(),
)
def test_loads_stay_within_their_bound(num_checkpoints, num_actors, gpu, fetched):
    cost = load_tokens(gpu=gpu, fetched=fetched)
    items = plan_items(make_works(num_checkpoints, [2048]), num_actors, cost)
    assert len(items) <= num_checkpoints + 8 * num_actors
    if gpu and fetched:
        assert len(items) <= num_checkpoints + num_actors, "fetching is what takes long"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "num_actors", [1, 2, 3, 5, 7, 8, 12, 16, 24, 32, 48, 64, 87, 100, 121, 127, 128]
)
def test_a_long_series_ends_within_a_tenth_of_the_earliest_possible(num_actors, gpu):
    """351 checkpoints on D: nobody can score before a load, then all do at full speed."""
    cost = load_tokens(gpu=gpu, fetched=False)
    works = make_works(351, [2048])
    total = sum(work.num_tokens for work in works)
    earliest = max(cost + total / num_actors, -(-351 // num_actors) * cost)
    end = makespan(plan_items(works, num_actors, cost), num_actors, cost)
    assert earliest <= end <= 1.10 * earliest


def test_a_plan_is_played_through_as_actors_do_it():
    a, b = make_works(2, [10], sequence_length=10)
    whole = plan_items([a, b], 1, 30.0)
    assert makespan(whole, 1, 30.0) == 30 + 100 + 100, "the second loads while the first is scored"
    assert makespan(whole, 1, 150.0) == 150 + 150 + 100, "loading is what takes long"
    assert makespan(whole, 2, 30.0) == 130
    cut = [item for n in (4, 6) for item in plan_items(make_works(1, [n], 10), 1, 1.0)]
    assert makespan(cut, 1, 50.0) == 50 + 40 + 60, "two pieces of one checkpoint: one load"
    assert makespan(cut, 2, 50.0) == 50 + 60
    assert makespan([], 3, 1.0) == 0


def test_one_checkpoint_is_shared_evenly():
    items = plan_items(make_works(1, [2048]), 4, HERE)
    assert [item.num_tokens for item in items] == [512 * 2048] * 4


def test_small_work_is_not_cut():
    assert len(plan_items(make_works(1, [16], sequence_length=128), 4, HERE)) == 1


def test_whole_corpora_are_known_as_whole():
    (item,) = plan_items(make_works(1, [5, 7], sequence_length=16), 1, HERE)
    assert [rows.is_whole for rows in item.ranges] == [True, True]
