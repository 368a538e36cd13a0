"""Sums of measures over a corpus, shared among the workers that train a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ke_ray.core.statistics import GroupSums
from ke_ray.data.corpus import Corpus
from ke_ray.evaluation.sharing import Workers, share
from ke_ray.models.scoring import score_instances


def shared_sums(
    model: Any, corpus: Corpus, measures: Sequence[str], batch_size: int, workers: Workers
) -> GroupSums:
    """Sums over all of a corpus, for :func:`ke_ray.core.measures.evaluate`.

    Args:
        batch_size: instances per forward pass, at most.
        workers: who shares the passes; all call this, and all get the sums.

    Raises:
        UnsupportedArchitectureError, DataError, UserError: as ``score_instances``.
        RuntimeError: another worker failed.
    """
    device = next(model.parameters()).device
    num_rows = len(corpus.input_ids)
    # The last batch may be smaller; otherwise any order does.
    run_passes = partial(
        share,
        model=model,
        workers=workers,
        cost=lambda start: num_rows - start,
        content=corpus.sha256.encode,
    )
    sums = score_instances(
        model,
        corpus.input_ids,
        corpus.lengths,
        measures=measures,
        num_instances=corpus.num_instances,
        group_sizes=corpus.group_sizes,
        batch_size=workers.rows_per_pass(num_rows, batch_size),
        run_passes=run_passes,
    )
    return summed(sums, workers, device)


def summed(sums: GroupSums, workers: Workers, device: torch.device) -> GroupSums:
    """The sums of all workers' parts, in place."""
    sums.counts = workers.sum(sums.counts, device)
    sums.num_tokens = workers.sum(sums.num_tokens, device)
    if workers.size > 1:
        for table in sums.tables.values():  # as large as 64 C̄: a copy may not fit beside training
            dist.all_reduce(table)
    return sums
