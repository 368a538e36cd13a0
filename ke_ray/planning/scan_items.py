"""How a scan is cut into work items.

The unit of work is one instance of one corpus on one checkpoint. The work of one checkpoint is a
tape: its corpora one after the other. A work item is a stretch of one tape. Whole checkpoints are
dealt first, in order; the last ones, fewer than there are actors, are cut into pieces of about the
same length, so that all actors end together.

Finer pieces balance better and load more. Which cut is best is found by trying: ``makespan`` plays
a plan through, tokens being its unit of time, and of all plans that end within 2 % of the earliest
the one with the fewest items is taken. There are at most eight pieces for each actor:

    loads ≤ num_checkpoints + 8 · num_actors.

Nothing here knows Ray.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "BYTES_PER_S",
    "FLOPS_PER_S",
    "CheckpointWork",
    "CorpusWork",
    "Stretch",
    "WorkItem",
    "load_tokens",
    "makespan",
    "plan_items",
]

#: Assumed of an actor, to weigh another load against a better balance (60 % of an H100's 989).
FLOPS_PER_S = {"cpu": 1e12, "gpu": 6e14}
BYTES_PER_S = {"here": 1e9, "fetched": 1e8}

#: No piece is shorter: what else an item costs would show.
MIN_TOKENS_OF_A_CUT = 65_536

_PIECES_OF_AN_ACTOR = 8
_SLACK = 1.02


@dataclass(frozen=True)
class CorpusWork:
    """What is to be computed of one corpus: which measures, over how many instances.

    ``group_sizes`` are those of the jackknife groups; None makes equal ones.
    """

    corpus: str
    measures: tuple[str, ...]
    num_instances: int
    sequence_length: int
    group_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CheckpointWork:
    """What is to be computed of one checkpoint; ``index`` is its place in the listing."""

    index: int
    corpora: tuple[CorpusWork, ...]

    @property
    def num_instances(self) -> int:
        """Length of the tape."""
        return sum(work.num_instances for work in self.corpora)

    @property
    def num_tokens(self) -> int:
        """Tokens on the tape, padding included."""
        return sum(work.num_instances * work.sequence_length for work in self.corpora)


@dataclass(frozen=True)
class Stretch:
    """Instances ``start`` … ``stop − 1`` of one corpus."""

    work: CorpusWork
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the corpus, so that the actor itself can evaluate it."""
        return self.start == 0 and self.stop == self.work.num_instances


@dataclass(frozen=True)
class WorkItem:
    """A stretch of one checkpoint's tape, the unit that Ray schedules and retries."""

    index: int
    checkpoint: int
    stretches: tuple[Stretch, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to score, padding included."""
        return sum((s.stop - s.start) * s.work.sequence_length for s in self.stretches)


def load_tokens(*, gpu: bool, fetched: bool) -> float:
    """About how many tokens an actor could score while it gets one checkpoint.

    With F operations and B bytes per second, 2 operations and 4 bytes a weight: 2·F/B, for a
    model of any size.

    Args:
        gpu: whether actors have GPUs.
        fetched: whether checkpoints come over a network first.
    """
    flops_per_s = FLOPS_PER_S["gpu" if gpu else "cpu"]
    return 2 * flops_per_s / BYTES_PER_S["fetched" if fetched else "here"]


def plan_items(
    works: Sequence[CheckpointWork], num_actors: int, load_cost: float
) -> list[WorkItem]:
    """Cut the work into items, in the order in which to deal them.

    Args:
        works: one per checkpoint, in the order to scan them.
        num_actors: how many score at the same time.
        load_cost: of one checkpoint, in tokens: see ``load_tokens``.

    Returns:
        Items that cover each tape exactly once. Whole checkpoints come first and in order, then
        the pieces of the last ones, longest first.
    """
    # What is before the last rounds is the same in all plans.
    first = max(0, len(works) // num_actors - 3) * num_actors
    num_cut = len(works) % num_actors
    plans = [
        _items(works[first:], num_cut, each * num_actors)
        for each in range(_PIECES_OF_AN_ACTOR + 1 if num_cut else 1)
    ]
    ends = [makespan(plan, num_actors, load_cost) for plan in plans]
    good = [p for p, end in zip(plans, ends, strict=True) if end <= _SLACK * min(ends)]
    items = [*_items(works[:first], 0, 0), *min(good, key=len)]
    return [WorkItem(index, item.checkpoint, item.stretches) for index, item in enumerate(items)]


def makespan(items: Sequence[WorkItem], num_actors: int, load_cost: float) -> float:
    """When the last item is done, in tokens scored, if every actor is equally fast.

    Actors behave as ``ke_ray.engine.scan.scorer`` does: each has two items at a time, loads for one
    while it scores the other, and loads a checkpoint that both need once.

    Args:
        items: in the order in which they are dealt: to whoever has a place free first.
        load_cost: tokens that could be scored while one checkpoint loads.
    """
    places = [(0.0, held, actor) for held in range(2) for actor in range(num_actors)]
    loaded, scored = [0.0] * num_actors, [0.0] * num_actors
    current: list[list[tuple[int, float, float]]] = [[] for _ in range(num_actors)]
    for item in items:
        now, _, actor = heapq.heappop(places)
        mine = [entry for entry in current[actor] if entry[2] > now]
        ready = next((max(now, at) for index, at, _ in mine if index == item.checkpoint), None)
        if ready is None:
            ready = loaded[actor] = max(now, loaded[actor]) + load_cost
        scored[actor] = max(ready, scored[actor]) + item.num_tokens
        current[actor] = [*mine, (item.checkpoint, ready, scored[actor])]
        heapq.heappush(places, (scored[actor], 1, actor))
    return max(scored, default=0.0)


def _items(works: Sequence[CheckpointWork], num_cut: int, num_pieces: int) -> list[WorkItem]:
    """Items of ``works``, the last ``num_cut`` of them in ``num_pieces`` pieces or fewer."""
    num_whole = len(works) - num_cut
    pieces = [(work, 0, work.num_instances) for work in works[:num_whole]]
    if cut := works[num_whole:]:
        total = sum(work.num_tokens for work in cut)
        wanted = [num_pieces * work.num_tokens // total for work in cut]
        found = [piece for work, n in zip(cut, wanted, strict=True) for piece in _cut(work, n)]
        pieces += sorted(found, key=lambda piece: piece[1] - piece[2])
    return [
        WorkItem(index, work.index, tuple(_stretches(work, start, stop)))
        for index, (work, start, stop) in enumerate(pieces)
    ]


def _cut(work: CheckpointWork, wanted: int) -> Iterator[tuple[CheckpointWork, int, int]]:
    """Cut one tape into ``wanted`` pieces of about equal length, or fewer longer ones."""
    most = min(work.num_instances, work.num_tokens // MIN_TOKENS_OF_A_CUT)
    number = max(1, min(wanted, most))
    marks = [round(k * work.num_instances / number) for k in range(number + 1)]
    yield from ((work, a, b) for a, b in itertools.pairwise(marks))


def _stretches(work: CheckpointWork, start: int, stop: int) -> Iterator[Stretch]:
    """The part of each corpus that lies on the tape between ``start`` and ``stop``."""
    offset = 0
    for corpus in work.corpora:
        first, last = max(start - offset, 0), min(stop - offset, corpus.num_instances)
        if first < last:
            yield Stretch(corpus, first, last)
        offset += corpus.num_instances
