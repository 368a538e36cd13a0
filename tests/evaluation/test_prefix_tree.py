"""Trees hold every sequence, share what is common, and let a node see its ancestors only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_ray.evaluation.prefix_tree import Span, build_trees, join_short, plan_batches

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)
span_lists = st.lists(st.builds(Span, tokens, tokens), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(spans=span_lists, share=st.booleans(), join=st.booleans())
def test_every_target_is_read_behind_its_own_prefix(
    spans: list[Span], share: bool, join: bool
) -> None:
    seen = set()
    trees = build_trees(spans, share=share)
    for tree in join_short(trees, batch_tokens=64) if join else trees:
        allowed = tree.allowed()
        for place, token, index, position in tree.targets:
            node = tree.reads[place]
            ancestors = np.flatnonzero(allowed[node])
            span = spans[index]
            expected = [*span.context_ids, *span.target_ids[:position]]
            assert [tree.tokens[a] for a in ancestors] == expected
            assert [tree.depths[a] for a in ancestors] == list(range(len(expected)))
            assert ancestors[-1] == node
            assert token == span.target_ids[position]
            seen.add((index, position))
        assert tree.is_chain == bool((allowed == np.tri(len(tree.tokens), dtype=bool)).all()) or (
            len(tree.blocks) > 1
        )
    assert seen == {(i, p) for i, span in enumerate(spans) for p in range(len(span.target_ids))}


def test_choices_share_their_context() -> None:
    context = list(range(100, 120))
    spans = [Span(context, [1, 2]), Span(context, [1, 3]), Span(context, [4, 5, 6])]
    (tree,) = build_trees(spans)
    assert len(tree.tokens) == 20 + 1 + 2
    assert len(tree.reads) == 1 + 1 + 2
    assert [len(t.tokens) for t in build_trees(spans, share=False)] == [21, 22]


def test_one_token_choices_need_the_context_only() -> None:
    (tree,) = build_trees([Span([1, 2, 3], [token]) for token in (7, 8, 9)])
    assert tree.tokens == [1, 2, 3]
    assert tree.is_chain
    assert tree.reads == [2]


def test_little_in_common_is_not_shared() -> None:
    spans = [Span([1, *range(10, 30)], [2]), Span([1, *range(40, 60)], [2])]
    assert len(build_trees(spans)) == 2


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 150), max_size=60))
def test_rows_hold_every_short_sequence(sizes: list[int]) -> None:
    # A sequence of its own for each size: the first token tells them apart.
    trees = build_trees([Span([first] * size, [0]) for first, size in enumerate(sizes)])
    rows = join_short(trees, batch_tokens=2048)
    assert sorted(token for row in rows for token in row.tokens) == sorted(
        token for tree in trees for token in tree.tokens
    )
    long = [row for row in rows if len(row.tokens) > 64 and row.is_chain]
    assert [len(row.tokens) for row in long] == [size for size in sizes if size > 64]
    short = [size for size in sizes if size <= 64]
    joined = [row for row in rows if row not in long]
    lengths = [len(row.tokens) for row in joined]
    assert max(lengths, default=0) < 128 + 8
    # Padding is never more than half, with a row to spare.
    assert len(joined) * max(lengths, default=0) <= 2 * sum(short) + 128


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (43, 43), (60, 60), (64, 64), (12, 60)])
@pytest.mark.parametrize("number", [60, 2000])
def test_rows_have_next_to_no_padding(shortest: int, longest: int, number: int) -> None:
    sizes = np.random.default_rng(0).integers(shortest, longest + 1, number)
    trees = build_trees([Span([i] * n, [0]) for i, n in enumerate(sizes)])
    rows = join_short(trees, batch_tokens=2048)
    padded = len(rows) * max(len(row.tokens) for row in rows)
    assert padded <= 1.05 * sizes.sum()


@pytest.mark.parametrize(("number", "joins"), [(60, True), (2000, False)])
def test_trees_are_joined_where_they_would_be_padded(number: int, joins: bool) -> None:
    sizes = np.random.default_rng(0).integers(15, 50, number)
    trees = build_trees([Span([i] * n, [0]) for i, n in enumerate(sizes)])
    limits = {"batch_tokens": 2048, "batch_reads": 600}
    batches = plan_batches(trees, **limits, join=True)
    assert any(not tree.is_chain for batch in batches for tree in batch) is joins
    if joins:
        assert len(batches) < len(plan_batches(trees, **limits))


@settings(max_examples=100, deadline=None)
@given(spans=span_lists, batch_tokens=st.integers(1, 40), batch_reads=st.integers(1, 20))
def test_batches_hold_every_tree_within_the_limits(
    spans: list[Span], batch_tokens: int, batch_reads: int
) -> None:
    apart = build_trees(spans)
    trees = join_short(apart, batch_tokens=batch_tokens)
    longest = max(len(tree.tokens) for tree in apart)
    assert all(len(tree.tokens) <= max(longest, batch_tokens) for tree in trees)
    batches = plan_batches(trees, batch_tokens=batch_tokens, batch_reads=batch_reads)
    assert sorted(id(tree) for batch in batches for tree in batch) == sorted(map(id, trees))
    for batch in batches:
        assert len({tree.is_chain for tree in batch}) == 1
        if len(batch) > 1:
            assert len(batch) * max(len(tree.tokens) for tree in batch) <= batch_tokens
            assert sum(len(tree.reads) for tree in batch) <= batch_reads
