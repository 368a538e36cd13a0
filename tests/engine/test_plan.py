"""Work items cover every instance exactly once, with few loads, whatever the numbers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.engine.plan import CheckpointWork, CorpusWork, plan_items
from ke_ray.engine.scorer_output import item_from_json, item_to_json


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
    items = plan_items(make_works(num_checkpoints, sizes), num_actors)
    covered = Counter(
        (item.checkpoint, stretch.work.corpus, instance)
        for item in items
        for stretch in item.stretches
        for instance in range(stretch.start, stretch.stop)
    )
    assert set(covered.values()) == {1}
    assert len(covered) == num_checkpoints * sum(sizes)
    assert [item.index for item in items] == list(range(len(items)))


@given(num_checkpoints=st.integers(1, 60), num_actors=st.integers(1, 20))
def test_loads_stay_within_their_bound(num_checkpoints, num_actors):
    items = plan_items(make_works(num_checkpoints, [2048]), num_actors)
    assert len(items) <= num_checkpoints + num_actors - 1


def test_one_checkpoint_is_shared_evenly():
    items = plan_items(make_works(1, [2048]), 4)
    assert [item.num_tokens for item in items] == [512 * 2048] * 4


def test_small_work_is_not_cut():
    assert len(plan_items(make_works(1, [16], sequence_length=128), 4)) == 1


def test_whole_corpora_are_known_as_whole():
    (item,) = plan_items(make_works(1, [5, 7], sequence_length=16), 1)
    assert [stretch.is_whole for stretch in item.stretches] == [True, True]


@pytest.mark.parametrize("num_actors", [1, 2, 3, 8])
def test_items_survive_their_way_to_the_actor(num_actors):
    for item in plan_items(make_works(3, [100, 2048]), num_actors):
        assert item_from_json(item_to_json(item)) == item
