"""The deal of a scan's work to scorers that come and go.

What is not dealt yet is planned for as many scorers as there are at the time, and planned anew
where their number changes: so the last checkpoints are cut when their turn comes, for those who
are there then. What a lost scorer had goes back and is dealt to others.

A scorer asks with a ticket of Ray Data, and Ray Data repeats the ticket where the scorer was lost.
Then the ticket gets other work; but where the item was scored already, the same again, since the
first answer may have arrived, and then Ray Data drops the second. An item is scored twice where a
scorer was taken for lost and was not: the collector takes each instance once.

Nothing here knows Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ke_ray.planning.scan_items import CheckpointWork, Stretch, WorkItem, plan_stretches


@dataclass(frozen=True)
class Deal:
    """An item for a scorer.

    Attributes:
        item: what to score.
        losses: how many scorers were lost while they scored it.
    """

    item: WorkItem
    losses: int


@dataclass
class _Dealt:
    index: int
    stretch: Stretch
    scorer: str
    is_begun: bool = False
    is_scored: bool = False


class Dealer:
    """Work that is left, and what was dealt.

    Args:
        works: one per checkpoint, in the order to scan them.
        num_scorers: how many are expected first.
        load_cost: see ``scan_items.load_tokens``.
    """

    def __init__(self, works: Sequence[CheckpointWork], num_scorers: int, load_cost: float) -> None:
        self._left = [Stretch(work, 0, work.num_instances) for work in works]
        self._num_scorers = num_scorers
        self._were_all_here = False
        self._seen: set[str] = set()  # all that have ever asked
        self._lost: set[str] = set()
        self._load_cost = load_cost
        self._is_planned = False
        self._dealt: dict[int, _Dealt] = {}  # by ticket
        self._num_items = 0

    def take(self, ticket: int, scorer: str) -> Deal | None:
        """The next item; None where there is none for this scorer now: see ``is_over``."""
        self._seen.add(scorer)
        self._expect(max(self._num_scorers, len(self._seen - self._lost)))
        if earlier := self._dealt.pop(ticket, None):
            if earlier.is_scored:
                return self._deal(ticket, scorer, earlier.stretch)
            self._give_back(earlier)
        busy = Counter(each.scorer for each in self._dealt.values() if not each.is_scored)
        num_idle = max(0, self._num_scorers - len(busy.keys() | {scorer}))
        if not self._is_planned:
            self._left = plan_stretches(_joined(self._left), self._num_scorers, self._load_cost)
            self._is_planned = True
        share = (len(self._left) + busy.total()) / self._num_scorers
        is_far_ahead = busy[scorer] >= max(2, share)  # what is more than its share others fetch
        # Who has an item leaves one for each who has none.
        if not self._left or is_far_ahead or (busy[scorer] and len(self._left) <= num_idle):
            return None
        return self._deal(ticket, scorer, self._left.pop(0))

    def is_over(self) -> bool:
        """Whether nothing is left, and nothing that was dealt can come back but by its ticket."""
        return not self._left and all(each.is_scored for each in self._dealt.values())

    def begin(self, item: int) -> None:
        """A scorer begins with an item; if it is lost from now on, that may be the item's doing."""
        for each in self._dealt.values():
            each.is_begun |= each.index == item

    def end(self, item: int) -> None:
        """An item is scored, and its answer is about to leave."""
        for each in self._dealt.values():
            each.is_scored |= each.index == item

    @property
    def items(self) -> set[int]:
        """Those that were dealt and not given back."""
        return {each.index for each in self._dealt.values()}

    def update(self, lost: Collection[str]) -> None:
        """Take note of which scorers are dead, or restart, at the moment."""
        self._lost = set(lost)
        for ticket, each in list(self._dealt.items()):
            if each.scorer in self._lost and not each.is_scored:
                self._give_back(self._dealt.pop(ticket))
        num_here = len(self._seen - self._lost)
        # Scorers start one after the other: fewer than expected are no loss before all were there.
        self._were_all_here |= num_here >= self._num_scorers
        if self._were_all_here:
            self._expect(max(1, num_here))

    def _expect(self, num_scorers: int) -> None:
        self._is_planned &= num_scorers == self._num_scorers
        self._num_scorers = num_scorers

    def _deal(self, ticket: int, scorer: str, stretch: Stretch) -> Deal:
        item = WorkItem(self._num_items, stretch.work.index, stretch.ranges)
        self._num_items += 1
        self._dealt[ticket] = _Dealt(item.index, stretch, scorer)
        return Deal(item, stretch.losses)

    def _give_back(self, dealt: _Dealt) -> None:
        losses = dealt.stretch.losses + dealt.is_begun
        self._left.append(replace(dealt.stretch, losses=losses, was_dealt=True))
        self._is_planned = False


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """In the order of the listing, pieces that follow each other as one.

    Not those that were dealt before: a late answer to one of them has to fit the others.
    """
    joined: list[Stretch] = []
    for each in sorted(stretches, key=lambda each: (each.work.index, each.start)):
        last = joined[-1] if joined else None
        is_new = last and not (last.was_dealt or each.was_dealt)
        if last and is_new and (last.work, last.stop) == (each.work, each.start):
            joined[-1] = replace(last, stop=each.stop)
        else:
            joined.append(each)
    return joined
