"""Token sequences packed into prefix trees, so that what they share is computed once.

Spans to score often start with the same tokens: the choices of one question, or twin sentences.
Sorted lexicographically, sequences with a common prefix are neighbours; a run of neighbours that
share enough becomes one *tree*: its nodes are tokens, laid out so that each sequence appends only
what the previous one lacks. A forward pass over the nodes, in which a node attends to its
ancestors and itself and has its depth as position, gives every sequence the same hidden states as
a pass of its own. A tree without branches is a plain sequence and needs no mask.

    spans  (context, target):   ABC|DE   ABC|DF   ABC|G        inputs: ABCD, ABC
    tree   tokens A B C D, depths 0 1 2 3; predictions read: node C (→ D, G), node D (→ E, F)

The last target token is only predicted, so it is never a node.

Short trees can then be joined into rows of about the same length (``join_short``). A node still
attends to its ancestors only, so trees of one row do not see each other, and a batch of such rows
has little padding although its sequences differ in length. ``plan_batches`` does so where it pays:
many sequences, sorted by length, have little padding as they are.

Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

#: A sequence joins a tree when it shares at least this part of its own tokens with its neighbour:
#: below it, attention over the longer row costs more than the shared tokens save.
_MIN_SHARED = 0.25

#: Nodes of a tree at most, unless one sequence is longer: the mask is quadratic in them.
_MAX_NODES = 1024

#: Nodes of a row of joined trees, about: enough for several trees to fill it evenly, and few enough
#: for attention over the other trees' nodes, computed and masked, to cost little.
_ROW_NODES = 128

#: Lengths of rows that are tried.
_MAX_TRIES = 8

#: What the mask and the longer rows add to a joined row's cost, at most (measured: 0 to 6 %).
_JOINED_COST = 1.06


@dataclass(frozen=True)
class Span:
    """Tokens to condition on and tokens to score; both have at least one."""

    context_ids: Sequence[int]
    target_ids: Sequence[int]


@dataclass
class PrefixTree:
    """Nodes in an order in which ancestors come first; after ``join_short``, of several trees.

    Attributes:
        tokens, depths: per node.
        paths: per sequence, its nodes in order [length].
        blocks: per sequence that adds nodes: (first new node, shared path before it); the new
            nodes form a chain.
        reads: sorted nodes whose hidden state is read.
        targets: (index into ``reads``, token to predict, span, position in the span's target).
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    blocks: list[tuple[int, npt.NDArray[np.int64]]] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether it is one plain sequence."""
        return len(self.blocks) == 1

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [nodes, nodes]: row i may attend to column j (itself or an ancestor)."""
        mask = np.zeros((len(self.tokens), len(self.tokens)), dtype=np.bool_)
        ends = [first for first, _ in self.blocks[1:]] + [len(self.tokens)]
        for (first, shared), end in zip(self.blocks, ends, strict=True):
            mask[first:end, shared] = True
            mask[first:end, first:end] = np.tri(end - first, dtype=np.bool_)
        return mask


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def build_trees(spans: Sequence[Span], *, share: bool = True) -> list[PrefixTree]:
    """Trees that together hold every span.

    Args:
        spans: each with at least one context and one target token.
        share: False keeps every distinct input sequence a chain of its own.

    Returns:
        trees in lexicographic order; equal inputs are one sequence either way.
    """
    inputs = [(*span.context_ids, *span.target_ids[:-1]) for span in spans]
    order = sorted(range(len(spans)), key=inputs.__getitem__)
    trees: list[PrefixTree] = []
    reads: list[dict[int, list[tuple[int, int, int]]]] = []
    previous: tuple[int, ...] = ()
    path = np.zeros(0, dtype=np.int64)
    for index in order:
        tokens = inputs[index]
        shared = _common_prefix(previous, tokens)
        equal = shared == len(tokens) == len(previous)
        enough = share and shared >= _MIN_SHARED * len(tokens) and shared > 0
        room = trees and len(trees[-1].tokens) + len(tokens) - shared <= _MAX_NODES
        if not trees or not (equal or (enough and room)):
            trees.append(PrefixTree())
            reads.append({})
            shared = 0
        tree = trees[-1]
        if shared < len(tokens):
            first = len(tree.tokens)
            tree.blocks.append((first, path[:shared]))
            tree.tokens.extend(tokens[shared:])
            tree.depths.extend(range(shared, len(tokens)))
            new = np.arange(first, len(tree.tokens))
            path = np.concatenate([path[:shared], new])
        previous = tokens
        span = spans[index]
        start = len(span.context_ids) - 1
        for position, token in enumerate(span.target_ids):
            node = int(path[start + position])
            reads[-1].setdefault(node, []).append((token, index, position))
    for tree, by_node in zip(trees, reads, strict=True):
        tree.reads = sorted(by_node)
        tree.targets = [
            (read, token, span, position)
            for read, node in enumerate(tree.reads)
            for token, span, position in by_node[node]
        ]
    return trees


def join_short(trees: Sequence[PrefixTree], *, batch_tokens: int) -> list[PrefixTree]:
    """Join trees of at most half a row (64 nodes) into rows of about 128 nodes; keep the others.

    Trees go into the fullest row that has room for them, longest first. The number of rows follows
    from the number of nodes; their length is the smallest with which that many rows suffice. Where
    none of a few lengths does (trees of 60 nodes never fill 128), it is the one with the least
    padding.

    Args:
        trees: from ``build_trees``.
        batch_tokens: no row is longer than this.
    """
    max_nodes = min(_ROW_NODES, batch_tokens)
    short = [tree for tree in trees if len(tree.tokens) <= max_nodes // 2]
    if not short:
        return list(trees)
    rows = [tree for tree in trees if len(tree.tokens) > max_nodes // 2]
    short.sort(key=lambda tree: -len(tree.tokens))
    sizes = [len(tree.tokens) for tree in short]
    num_rows = -(-sum(sizes) // max_nodes)
    first = max(sizes[0], -(-sum(sizes) // num_rows))
    plans: list[tuple[int, list[list[int]]]] = []  # nodes with padding, trees of each row
    for row_nodes in range(first, min(first + _MAX_TRIES, batch_tokens + 1)):
        groups = _fill_rows(sizes, row_nodes)
        width = max(sum(sizes[index] for index in group) for group in groups)
        plans.append((len(groups) * width, groups))
        if len(groups) <= num_rows:
            break
    groups = min(plans, key=lambda plan: plan[0])[1]
    return rows + [_joined([short[index] for index in group]) for group in groups]


def _fill_rows(sizes: Sequence[int], row_nodes: int) -> list[list[int]]:
    """Best fit: the indices of the sizes in each row, for sizes in falling order."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_nodes + 1)]
    for index, size in enumerate(sizes):
        room = next((room for room in range(size, row_nodes + 1) if by_room[room]), None)
        if room is None:
            room, row = row_nodes, len(rows)
            rows.append([])
        else:
            row = by_room[room].pop()
        rows[row].append(index)
        by_room[room - size].append(row)
    return rows


def _joined(trees: Sequence[PrefixTree]) -> PrefixTree:
    row = PrefixTree()
    for tree in trees:
        node, read = len(row.tokens), len(row.reads)
        row.tokens.extend(tree.tokens)
        row.depths.extend(tree.depths)
        row.blocks.extend((first + node, shared + node) for first, shared in tree.blocks)
        row.reads.extend(index + node for index in tree.reads)
        row.targets.extend(
            (index + read, token, span, position) for index, token, span, position in tree.targets
        )
    return row


def plan_batches(
    trees: Sequence[PrefixTree],
    *,
    batch_tokens: int,
    batch_reads: int,
    batch_overhead: int = 32,
    join: bool = False,
) -> list[list[PrefixTree]]:
    """Trees in batches of similar size, longest first, cut where that costs least.

    A batch costs its nodes with padding, plus ``batch_overhead`` tokens (every pass reads all
    weights). Of all ways to cut the trees, sorted by size, into runs, the cheapest is taken.

    Args:
        trees: chains and branched trees never share a batch: only the latter need a mask.
        batch_tokens: nodes of a batch at most, padding included (one tree always fits).
        batch_reads: hidden states that go through the LM head, at most (same).
        batch_overhead: cost of a pass, in tokens.
        join: join short trees (``join_short``) where that is cheaper.
    """
    separate = _batches(trees, batch_tokens, batch_reads, batch_overhead)
    if not join:
        return separate
    rows = join_short(trees, batch_tokens=batch_tokens)
    joined = _batches(rows, batch_tokens, batch_reads, batch_overhead)
    is_cheaper = _JOINED_COST * _cost(joined, batch_overhead) < _cost(separate, batch_overhead)
    return joined if is_cheaper else separate


def _cost(batches: Sequence[Sequence[PrefixTree]], batch_overhead: int) -> int:
    """Tokens with padding and overhead."""
    widths = [max(len(tree.tokens) for tree in batch) for batch in batches]
    return sum(
        len(batch) * width + batch_overhead for batch, width in zip(batches, widths, strict=True)
    )


def _batches(
    trees: Sequence[PrefixTree], batch_tokens: int, batch_reads: int, batch_overhead: int
) -> list[list[PrefixTree]]:
    batches: list[list[PrefixTree]] = []
    for is_chain in (True, False):
        group = [tree for tree in trees if tree.is_chain is is_chain]
        group.sort(key=lambda tree: -len(tree.tokens))
        for first, end in _cheapest_cuts(group, batch_tokens, batch_reads, batch_overhead):
            batches.append(group[first:end])
    return batches


def _cheapest_cuts(
    trees: Sequence[PrefixTree], batch_tokens: int, batch_reads: int, batch_overhead: int
) -> list[tuple[int, int]]:
    """Runs [first, end) of trees sorted from the longest, by dynamic programming from the end."""
    cost = [0] * (len(trees) + 1)
    cut = [0] * len(trees)
    for first in range(len(trees) - 1, -1, -1):
        width = len(trees[first].tokens)
        reads = 0
        best = -1
        for end in range(first + 1, len(trees) + 1):
            reads += len(trees[end - 1].reads)
            padded = (end - first) * width
            if end > first + 1 and (padded > batch_tokens or reads > batch_reads):
                break
            candidate = padded + batch_overhead + cost[end]
            if best < 0 or candidate <= best:
                best, cut[first] = candidate, end
        cost[first] = best
    runs = []
    first = 0
    while first < len(trees):
        runs.append((first, cut[first]))
        first = cut[first]
    return runs
