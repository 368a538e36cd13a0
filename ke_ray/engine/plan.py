"""How a scan is cut into work items.

The unit of work is one instance of one corpus on one checkpoint. The work of one checkpoint is a
tape: its corpora one after the other. A work item is a stretch of one tape. Whole checkpoints are
dealt first; the last ones, fewer than there are actors, are cut so that all actors end together.
Cutting costs one more load per cut: at most ``num_actors − 1`` in all,

    loads ≤ num_checkpoints + num_actors − 1.

Nothing here knows Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["CheckpointWork", "CorpusWork", "Stretch", "WorkItem", "plan_items"]

#: A stretch shorter than this costs more to load for than it saves.
MIN_TOKENS_OF_A_CUT = 65_536


@dataclass(frozen=True)
class CorpusWork:
    """What is to be computed of one corpus: which measures, over how many instances."""

    corpus: str
    measures: tuple[str, ...]
    num_instances: int
    sequence_length: int


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


def plan_items(works: Sequence[CheckpointWork], num_actors: int) -> list[WorkItem]:
    """Cut the work into items, in the order in which to deal them.

    Args:
        works: one per checkpoint, in the order to scan them.
        num_actors: how many score at the same time.

    Returns:
        Items that cover each tape exactly once. Whole checkpoints come first and in order, then
        the pieces of the last ones, longest first.
    """
    num_cut = len(works) % num_actors
    whole, rest = works[: len(works) - num_cut], works[len(works) - num_cut :]
    pieces = [(work, 0, work.num_instances) for work in whole]
    pieces += sorted(_cut(rest, num_actors), key=lambda piece: piece[1] - piece[2])
    return [
        WorkItem(index, work.index, tuple(_stretches(work, start, stop)))
        for index, (work, start, stop) in enumerate(pieces)
    ]


def _cut(
    works: Sequence[CheckpointWork], num_actors: int
) -> Iterator[tuple[CheckpointWork, int, int]]:
    """Cut the joined tapes of ``works`` into ``num_actors`` equal lengths."""
    total = sum(work.num_instances for work in works)
    offset = 0
    for work in works:
        length = work.num_instances
        tokens_per_instance = work.num_tokens / length
        least = max(1, round(MIN_TOKENS_OF_A_CUT / tokens_per_instance))
        marks = [round(k * total / num_actors) - offset for k in range(1, num_actors)]
        cuts = [0]
        for mark in marks:
            if mark - cuts[-1] >= least and length - mark >= least:
                cuts.append(mark)
        cuts.append(length)
        yield from ((work, a, b) for a, b in itertools.pairwise(cuts))
        offset += length


def _stretches(work: CheckpointWork, start: int, stop: int) -> Iterator[Stretch]:
    """The part of each corpus that lies on the tape between ``start`` and ``stop``."""
    offset = 0
    for corpus in work.corpora:
        first, last = max(start - offset, 0), min(stop - offset, corpus.num_instances)
        if first < last:
            yield Stretch(corpus, first, last)
        offset += corpus.num_instances
