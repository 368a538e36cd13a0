"""Rounds of a scan with a wanted precision: which instances are scored now, and when to stop.

The manifest's ``num_instances`` of a corpus says which round the folder is in. It is written before
the first value of a round and decided from the values of the round before, when all of them are
there; so a scan that is killed at any moment decides the same when it resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core import stopping
from ke_ray.core.jackknife import group_sizes
from ke_ray.data.corpus import Corpus
from ke_ray.planning.scan_items import CheckpointWork, CorpusWork
from ke_ray.results import ScanFolder
from ke_ray.secrets import redact
from ke_ray.studies.scan import PRECISE_MEASURE, ScanStudy

log = logging.getLogger(__name__)


def current_round(
    study: ScanStudy, whole: Mapping[str, Corpus], described: Mapping[str, Any]
) -> dict[str, Corpus]:
    """The instances to score now: those of the folder's round, or of the first one.

    Args:
        whole: the corpora with all N instances.
        described: the manifest's ``corpora``; empty for a new folder.
    """
    if not study.has_wanted_precision:
        return dict(whole)
    chosen = {}
    for name, corpus in whole.items():
        strides = stopping.round_strides(corpus.num_instances)
        first = next(iter(strides))
        count = described.get(name, {}).get("num_instances", first)
        chosen[name] = corpus.thinned(strides[count])
    return chosen


def next_round(
    study: ScanStudy, whole: Mapping[str, Corpus], current: Mapping[str, Corpus], folder: ScanFolder
) -> dict[str, Corpus] | None:
    """The instances of the next round; None where every corpus is precise enough or at its end.

    Args:
        folder: has the values of the current round of all checkpoints that did not fail.
    """
    if not study.has_wanted_precision:
        return None
    chosen, has_next = dict(current), False
    for name, corpus in current.items():
        if corpus.num_instances == whole[name].num_instances:
            continue
        counts = [
            count
            for precision in _precisions(folder, corpus)
            if (count := _count(study, whole[name], corpus, precision)) is not None
        ]
        if counts:
            stride = stopping.round_strides(whole[name].num_instances)[max(counts)]
            chosen[name] = whole[name].thinned(stride)
            has_next = True
    return chosen if has_next else None


def missing_works(
    study: ScanStudy,
    refs: Sequence[CheckpointRef],
    corpora: Mapping[str, Corpus],
    finished: Mapping[tuple[str, str], set[str]],
) -> Iterator[CheckpointWork]:
    """What is not finished of each checkpoint."""
    for index, ref in enumerate(refs):
        missing = []
        for name, corpus in corpora.items():
            done = finished.get((ref.name, name), set())
            if measures := tuple(m for m in study.measures if m not in done):
                shape = (corpus.num_instances, corpus.sequence_length, corpus.group_sizes)
                missing.append(CorpusWork(name, measures, *shape))
        if missing:
            yield CheckpointWork(index, tuple(missing))


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """What the manifest says of a corpus."""
    return {
        "source": redact(corpus.source),
        "sha256": corpus.sha256,
        "num_instances": corpus.num_instances,
        "sequence_length": corpus.sequence_length,
        "num_tokens": corpus.num_tokens,
        "eos_token_id": corpus.eos_token_id,
        "sampling": corpus.sampling,
        "group_sizes": corpus.group_sizes and list(corpus.group_sizes),
        "stderr_factor": corpus.stderr_factor,
        "note": corpus.note and redact(corpus.note),
        "instance_ids": None if corpus.instance_ids is None else corpus.instance_ids.tolist(),
    }


def _count(
    study: ScanStudy, whole: Corpus, corpus: Corpus, precision: stopping.CurvePrecision
) -> int | None:
    wanted = precision.wanted_error(share=study.precision, absolute=study.stderr_nats)
    count = stopping.next_round(corpus.num_instances, whole.num_instances, precision, wanted)
    log.info(
        "Corpus %s, %d of %d instances: paired error %.3g nats, wanted %.3g: %s.",
        *(corpus.name, corpus.num_instances, whole.num_instances, precision.error, wanted),
        "precise enough" if count is None else f"{count} instances are next",
    )
    return count


def _precisions(folder: ScanFolder, corpus: Corpus) -> list[stopping.CurvePrecision]:
    """Of each series with at least two checkpoints; a lone checkpoint has nothing to pair.

    A folder where nothing can be paired has an infinite error, so that all N are scored.
    """
    entropy = _totals(folder.entropy(), corpus.name)
    replicates = _totals(folder.replicates(), corpus.name)
    left_out: dict[str, list[float]] = {}
    for row in replicates.sort_by("group").to_pylist():
        left_out.setdefault(row["checkpoint"], []).append(row["value"])
    rows = [
        row
        for row in entropy.to_pylist()
        if row["status"] == "ok"
        and row["data_sha256"] == corpus.sha256
        and row["checkpoint"] in left_out  # a model without memories has no value
    ]
    curves: dict[tuple[str | None, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["series"], row["seed"]), []).append(row)
    sizes = corpus.group_sizes or group_sizes(corpus.num_instances)
    found = [
        stopping.curve_precision(
            [row["value"] for row in curve], [left_out[row["checkpoint"]] for row in curve], sizes
        )
        for curve in curves.values()
        if len(curve) > 1
    ]
    return found or ([stopping.CurvePrecision(0.0, float("inf"))] if rows else [])


def _totals(table: pa.Table, corpus: str) -> pa.Table:
    of_corpus = pc.and_(
        pc.equal(table["corpus"], corpus), pc.equal(table["measure"], PRECISE_MEASURE)
    )
    return table.filter(pc.and_(of_corpus, pc.is_null(table["layer"])))
