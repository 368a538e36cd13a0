"""How near a scan comes to the earliest end where scorers join and are lost.

    python benchmarks/elastic.py [--json]

Plays the deal of a scan (``ke_ray.planning.scan_dealing``) through, with scorers that behave as
``ke_ray.engine.scan.scorer`` does: two items at a time, one loading while the other is scored. The
bound is the time in which the scorers that are there at each moment have scored everything at full
speed, each after its first load; what a lost scorer had begun counts against the scan.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ke_ray.planning.scan_dealing import Dealer
from ke_ray.planning.scan_items import CheckpointWork, CorpusWork

#: The paper's D: 2,048 instances of 2,048 tokens.
NUM_INSTANCES, LENGTH = 2048, 2048
#: A scorer that is lost is missed after so long, as a share of a checkpoint's scoring.
DETECTION = 0.05


@dataclass(frozen=True)
class Story:
    """Who is there when; times are in checkpoints scored by one scorer.

    Attributes:
        first: scorers at the start.
        joins: (time, how many).
        losses: (time, how many).
    """

    name: str
    checkpoints: int
    first: int
    joins: tuple[tuple[float, int], ...] = ()
    losses: tuple[tuple[float, int], ...] = ()


STORIES = (
    Story("as many all the time", 351, 8),
    Story("twice as many half-way", 100, 4, joins=((12.5, 4),)),
    Story("four times as many half-way", 351, 8, joins=((22.0, 24),)),
    Story("half are lost half-way", 100, 8, losses=((6.25, 4),)),
    Story("half are lost near the end", 64, 8, losses=((7.5, 4),)),
    Story(
        "spot nodes come and go",
        351,
        16,
        joins=((5.0, 8), (15.0, 8)),
        losses=((3.0, 4), (9.0, 8), (14.0, 4)),
    ),
)


@dataclass
class _Scorer:
    name: str
    loaded_at: float
    scored_at: float
    is_lost: bool = False
    tickets: list[int] = field(default_factory=list)


def play(story: Story, load: float) -> float:
    """The makespan of a story, in checkpoints.

    Args:
        load: of one checkpoint, as a share of its scoring.
    """
    tokens = NUM_INSTANCES * LENGTH
    corpus = CorpusWork("D", ("knowledge_entropy",), NUM_INSTANCES, LENGTH)
    works = [CheckpointWork(index, (corpus,)) for index in range(story.checkpoints)]
    dealer = Dealer(works, story.first, load * tokens)
    tickets, order, names = itertools.count(), itertools.count(), itertools.count()
    scorers: dict[str, _Scorer] = {}
    events: list[tuple[float, int, str, object]] = []
    lost: set[str] = set()
    left = float(story.checkpoints)
    end = 0.0

    def at(time: float, what: str, more: object = None) -> None:
        heapq.heappush(events, (time, next(order), what, more))

    at(0.0, "join", story.first)
    for time, number in story.joins:
        at(time, "join", number)
    for time, number in story.losses:
        at(time, "lose", number)

    def alive() -> list[str]:
        return [name for name, scorer in scorers.items() if not scorer.is_lost]

    def ask(now: float, scorer: _Scorer) -> None:
        deal = dealer.take(next(tickets), scorer.name)
        if deal is None:
            if not dealer.is_over():
                at(now + 0.01, "ask", scorer)
            return
        dealer.begin(deal.item.index)
        ready = scorer.loaded_at = max(now, scorer.loaded_at) + load
        size = deal.item.num_tokens / tokens
        scorer.scored_at = max(ready, scorer.scored_at) + size
        at(scorer.scored_at, "scored", (scorer, deal.item.index, size))

    while events and left > 1e-9:
        now, _, what, more = heapq.heappop(events)
        if what == "join":
            for _ in range(more):
                scorer = _Scorer(f"s{next(names)}", now, now)
                scorers[scorer.name] = scorer
                at(now, "ask", scorer)
                at(now, "ask", scorer)
            at(now + 1e-6, "update")
        elif what == "lose":
            for name in alive()[:more]:
                scorers[name].is_lost = True
                lost.add(name)
            at(now + DETECTION, "update")
        elif what == "update":
            dealer.update(lost)
        elif what == "ask" and not more.is_lost:
            ask(now, more)
        elif what == "scored" and not more[0].is_lost:
            scorer, item, size = more
            dealer.end(item)
            left -= size
            end = now
            ask(now, scorer)
    assert left <= 1e-9, f"{left:.2f} checkpoints were never scored"
    return end


def bound(story: Story, load: float) -> float:
    """The earliest end: everybody who is there scores at full speed after a first load."""
    changes = [(load, story.first), *((time + load, n) for time, n in story.joins)]
    changes += [(time, -n) for time, n in story.losses]
    left, now, number = float(story.checkpoints), 0.0, 0
    for time, change in sorted(changes):
        if number and number * (time - now) >= left:
            break
        left -= number * (time - now)
        now, number = time, number + change
    return now + left / number


def measure() -> list[dict[str, float | str]]:
    """Each story, at loads that cost a little and much."""
    rows: list[dict[str, float | str]] = []
    for story in STORIES:
        for load in (0.02, 0.3):
            end, earliest = play(story, load), bound(story, load)
            row = {"story": story.name, "load": load, "makespan": end, "bound": earliest}
            rows.append(row | {"ratio": end / earliest})
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    rows = measure()
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'story':32} {'load':>5} {'makespan':>9} {'bound':>7} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['story']:32} {row['load']:5.2f} {row['makespan']:9.2f} {row['bound']:7.2f} "
            f"{row['ratio']:6.3f}"
        )


if __name__ == "__main__":
    main()
