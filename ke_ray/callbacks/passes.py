"""Forward passes of a measurement, shared among workers that go on training where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ke_ray.core.statistics import GroupSums
from ke_ray.data.corpus import Corpus
from ke_ray.evaluation.sharing import Workers, together
from ke_ray.evaluation.sums import shared_sums, summed
from ke_ray.models.scoring import score_instances
from ke_ray.models.sharded import is_sharded


def live_sums(
    model: Any, corpus: Corpus, measures: Sequence[str], batch_size: int, workers: Workers
) -> GroupSums:
    """Sums over all of D, on every worker.

    Replicas make their passes without meeting: whatever one of them runs into, all learn of it
    afterwards, and none is left in a collective that the others answer with training's. Workers of
    a sharded model meet in every pass, and cannot go on where one fails.

    Raises:
        Exception: on every worker where it fails on one.
    """
    if workers.size == 1 or is_sharded(model):
        return shared_sums(model, corpus, measures, batch_size, workers)
    device = next(model.parameters()).device

    def own_passes(
        starts: Sequence[int], forward: Callable[[int], dict[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        if workers.rank >= len(starts) > 0:
            # What cannot be had fails on every worker alike, or this one would train on alone.
            forward(starts[0])  # the others are in theirs: no time is lost
        for start in starts[workers.rank :: workers.size]:
            yield start, forward(start)

    with together(workers, device):
        sums = score_instances(
            model,
            corpus.input_ids,
            corpus.lengths,
            measures=measures,
            num_instances=corpus.num_instances,
            group_sizes=corpus.group_sizes,
            batch_size=workers.rows_per_pass(corpus.num_instances, batch_size),
            run_passes=own_passes,
        )
    return summed(sums, workers, device)
