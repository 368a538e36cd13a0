"""The deal covers every instance once, whoever joins, is lost, or answers late."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.planning import scan_items
from ke_ray.planning.scan_dealing import Dealer
from ke_ray.planning.scan_items import CheckpointWork, CorpusWork


def make_works(number: int, num_instances: int = 2048) -> list[CheckpointWork]:
    corpora = tuple(
        CorpusWork(name, ("knowledge_entropy",), num_instances, 2048) for name in ("a", "b")
    )
    return [CheckpointWork(index, corpora) for index in range(number)]


def instances(item: scan_items.WorkItem) -> set[tuple[int, str, int]]:
    return {
        (item.checkpoint, rows.work.corpus, instance)
        for rows in item.ranges
        for instance in range(rows.start, rows.stop)
    }


@given(number=st.integers(1, 8), scorers=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_every_instance_is_scored_whoever_comes_and_goes(number, scorers, seed):
    rng = random.Random(seed)
    dealer = Dealer(make_works(number, 64), scorers, 1000.0)
    covered: Counter[tuple[int, str, int]] = Counter()
    alive, lost = [f"s{n}" for n in range(scorers)], set()
    held: dict[int, tuple[str, scan_items.WorkItem]] = {}
    repeated: list[int] = []  # tickets of lost scorers
    num_tickets = num_scorers = 0
    while not dealer.is_over():
        fate = rng.random() if num_scorers < 10 else 1.0
        if fate < 0.1:
            num_scorers += 1
            alive.append(f"late {num_scorers}")
        elif fate < 0.2 and len(alive) > 1:
            num_scorers += 1
            gone = alive.pop(rng.randrange(len(alive)))
            lost.add(gone)
            repeated += [ticket for ticket, (scorer, _) in held.items() if scorer == gone]
            held = {t: (s, item) for t, (s, item) in held.items() if s != gone}
        if rng.random() < 0.5:
            dealer.update(lost)
        if held and rng.random() < 0.5:
            ticket = rng.choice(list(held))
            _, item = held.pop(ticket)
            dealer.end(item.index)
            covered.update(instances(item))
            continue
        num_tickets += not repeated
        ticket = repeated.pop() if repeated else num_tickets
        scorer = rng.choice(alive)
        if sum(s == scorer for s, _ in held.values()) < 2 and (deal := dealer.take(ticket, scorer)):
            held[ticket] = (scorer, deal.item)
    for ticket in repeated:
        dealer.take(ticket, alive[0])
    assert len(covered) == number * 128
    assert set(covered.values()) == {1}


def test_work_is_cut_for_those_who_are_there_when_its_turn_comes():
    dealer = Dealer(make_works(7), 2, 1000.0)
    (whole,) = {work.num_tokens for work in make_works(1)}
    for ticket, scorer in enumerate("abab"):
        deal = dealer.take(ticket, scorer)
        assert deal.item.num_tokens == whole
        dealer.end(deal.item.index)
    dealer.take(4, "c")  # with its first question it is counted
    dealer.take(5, "d")
    sizes = [dealer.take(ticket, scorer).item.num_tokens for ticket, scorer in enumerate("ab", 6)]
    assert max(sizes) < whole, "the last ones are cut for four"


def test_who_has_an_item_leaves_one_for_each_who_has_none():
    dealer = Dealer(make_works(2), 2, 1e9)
    first = dealer.take(0, "a")
    assert dealer.take(1, "a") is None
    assert not dealer.is_over()
    assert dealer.take(2, "b").item.checkpoint != first.item.checkpoint


def test_who_fetches_far_ahead_takes_no_more_than_a_share():
    dealer = Dealer(make_works(40), 4, 1e9)
    taken = [dealer.take(ticket, "a") for ticket in range(17)]  # the first to be there
    assert sum(deal is not None for deal in taken) == 10


def test_pieces_that_were_dealt_before_are_not_joined():
    dealer = Dealer(make_works(1, 64), 2, 0.0)
    first, second = dealer.take(0, "a").item, dealer.take(1, "b").item
    dealer.update(["a", "b"])
    again = [dealer.take(2, "c").item, dealer.take(3, "d").item]
    assert {item.ranges for item in again} == {first.ranges, second.ranges}


def test_a_repeated_ticket_gets_the_same_again_where_its_item_was_scored():
    dealer = Dealer(make_works(2), 1, 0.0)
    scored = dealer.take(0, "a")
    dealer.end(scored.item.index)
    assert dealer.take(0, "b").item.ranges == scored.item.ranges


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_loss_counts_against_an_item_that_was_begun(is_begun):
    dealer = Dealer(make_works(1, 8), 1, 0.0)
    deal = dealer.take(0, "a")
    if is_begun:
        dealer.begin(deal.item.index)
    dealer.update(["a"])
    again = dealer.take(1, "b")
    assert (again.losses, again.item.ranges) == (int(is_begun), deal.item.ranges)
    assert dealer.items == {again.item.index}
