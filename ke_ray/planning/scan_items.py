"""Work items of a scan, and how its work is cut into them.

The unit of work is one instance of one corpus on one checkpoint. The work of one checkpoint is a
tape: its corpora one after the other. A work item is a part of one tape. Whole checkpoints are
dealt first, in order; the last ones, fewer than there are actors, are cut into pieces of about the
same length, so that all actors end together. ``ke_ray.planning.scan_dealing`` plans what is left
anew where actors come or go.

Finer pieces balance better and load more. The best cut is found by trial: ``makespan`` plays a plan
through, with tokens as its unit of time, and of all plans that end within 2 % of the earliest the
one with the fewest items is taken. There are at most eight pieces for each actor:

    loads ≤ num_checkpoints + 8 · num_actors.

Nothing here knows Ray.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

#: Assumed of an actor, to weigh another load against a better balance (60 % of an H100's 989).
FLOPS_PER_S = {"cpu": 1e12, "gpu": 6e14}
BYTES_PER_S = {"here": 1e9, "fetched": 1e8}

#: No piece is shorter: what else an item costs would show.
MIN_TOKENS_OF_A_CUT = 65_536

_PIECES_OF_AN_ACTOR = 8
_SLACK = 1.02


@dataclass(frozen=True)
class CorpusWork:
    """The work on one corpus: which measures, over how many instances.

    ``group_sizes`` are those of the jackknife groups; None makes equal ones.
    """

    corpus: str
    measures: tuple[str, ...]
    num_instances: int
    sequence_length: int
    group_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CheckpointWork:
    """The work on one checkpoint; ``index`` is its position in the listing."""

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
class RowRange:
    """Instances ``start`` … ``stop − 1`` of one corpus."""

    work: CorpusWork
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the corpus, so that the actor itself can evaluate it."""
        return self.start == 0 and self.stop == self.work.num_instances


@dataclass(frozen=True)
class Stretch:
    """Positions ``start`` … ``stop − 1`` of a checkpoint's tape, and how often they were lost.

    ``was_dealt``: a scorer had them before, whose answer may still come.
    """

    work: CheckpointWork
    start: int
    stop: int
    losses: int = 0
    was_dealt: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens on it, padding included."""
        return sum((r.stop - r.start) * r.work.sequence_length for r in self.ranges)

    @property
    def ranges(self) -> tuple[RowRange, ...]:
        """What of each corpus lies on it."""
        return tuple(_ranges(self.work, self.start, self.stop))


@dataclass(frozen=True)
class WorkItem:
    """A part of one checkpoint's tape, the unit that is dealt to an actor."""

    index: int
    checkpoint: int
    ranges: tuple[RowRange, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to score, padding included."""
        return sum((s.stop - s.start) * s.work.sequence_length for s in self.ranges)


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
    whole = [Stretch(work, 0, work.num_instances) for work in works]
    return _items(plan_stretches(whole, num_actors, load_cost))


def plan_stretches(
    stretches: Sequence[Stretch], num_actors: int, load_cost: float
) -> list[Stretch]:
    """``plan_items`` of what is left: whole stretches, then pieces of the last ones."""
    # What is before the last rounds is the same in all plans.
    first = max(0, len(stretches) // num_actors - 3) * num_actors
    num_cut = len(stretches) % num_actors
    plans = [
        _with_pieces(stretches[first:], num_cut, each * num_actors)
        for each in range(_PIECES_OF_AN_ACTOR + 1 if num_cut else 1)
    ]
    ends = [makespan(_items(plan), num_actors, load_cost) for plan in plans]
    good = [p for p, end in zip(plans, ends, strict=True) if end <= _SLACK * min(ends)]
    return [*stretches[:first], *min(good, key=len)]


def makespan(items: Sequence[WorkItem], num_actors: int, load_cost: float) -> float:
    """When the last item is done, in tokens scored, if every actor is equally fast.

    Actors behave as ``ke_ray.engine.scan.scorer`` does: each has two items at a time, loads for one
    while it scores the other, and loads a checkpoint that both need once.

    Args:
        items: in the order in which they are dealt: to the actor that is free first.
        load_cost: tokens that could be scored while one checkpoint loads.
    """
    places = [(0.0, place, actor) for place in range(2) for actor in range(num_actors)]
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


def _items(stretches: Sequence[Stretch]) -> list[WorkItem]:
    return [WorkItem(i, each.work.index, each.ranges) for i, each in enumerate(stretches)]


def _with_pieces(stretches: Sequence[Stretch], num_cut: int, num_pieces: int) -> list[Stretch]:
    """``stretches``, the last ``num_cut`` of them in ``num_pieces`` pieces or fewer."""
    num_whole = len(stretches) - num_cut
    pieces = list(stretches[:num_whole])
    if cut := stretches[num_whole:]:
        total = sum(each.num_tokens for each in cut)
        shares = [num_pieces * each.num_tokens // total for each in cut]
        cuts = [piece for each, n in zip(cut, shares, strict=True) for piece in _cut(each, n)]
        pieces += sorted(cuts, key=lambda piece: piece.start - piece.stop)
    return pieces


def _cut(stretch: Stretch, num_pieces: int) -> Iterator[Stretch]:
    """Cut one stretch into ``num_pieces`` of about equal length, or fewer longer ones."""
    length = stretch.stop - stretch.start
    most = min(length, stretch.num_tokens // MIN_TOKENS_OF_A_CUT)
    number = max(1, min(num_pieces, most))
    marks = [stretch.start + round(k * length / number) for k in range(number + 1)]
    yield from (replace(stretch, start=a, stop=b) for a, b in itertools.pairwise(marks))


def _ranges(work: CheckpointWork, start: int, stop: int) -> Iterator[RowRange]:
    """The part of each corpus that lies on the tape between ``start`` and ``stop``."""
    offset = 0
    for corpus in work.corpora:
        first, last = max(start - offset, 0), min(stop - offset, corpus.num_instances)
        if first < last:
            yield RowRange(corpus, first, last)
        offset += corpus.num_instances
