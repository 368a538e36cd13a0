"""Snapshots of a model: probes, downstream tasks, perplexity and knowledge entropy.

A snapshot is stored as JSON without loss, so that a resumed run still has the one of its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ke_ray.core.acquisition import (
    Interval,
    TaskScore,
    acquisition_interval,
    forgetting_interval,
    paragraph_means,
)
from ke_ray.core.measures import evaluate, interventions_of
from ke_ray.core.statistics import GroupSums
from ke_ray.data.corpus import Corpus
from ke_ray.data.probes import Probe
from ke_ray.errors import CheckpointError
from ke_ray.evaluation.downstream import run_downstream
from ke_ray.evaluation.forward import autocast
from ke_ray.evaluation.perplexity import held_out_perplexity
from ke_ray.evaluation.probes import score_probes
from ke_ray.evaluation.sharing import Workers
from ke_ray.evaluation.sums import shared_sums
from ke_ray.models.scoring import score_instances
from ke_ray.studies.continual import ContinualStudy, MeasuredText
from ke_ray.studies.own_measures import use_own_measure


@dataclass(frozen=True)
class Questions:
    """Probes and texts on which a run's snapshots evaluate the model, the same before and after.

    Attributes:
        probes: of the injected facts; may be empty.
        held_out: text of the old corpus, for perplexity.
        entropy: instances for knowledge entropy.
    """

    tokenizer: Tokenizer
    probes: tuple[Probe, ...] = ()
    held_out: Corpus | None = None
    entropy: Corpus | None = None


@dataclass(frozen=True)
class Snapshot:
    """Evaluation of one model.

    Attributes:
        knowledge: K, nats per target token; None without probes.
        knowledge_summed: the same of summed log probabilities, nats.
        paragraphs: mean ℓ per token of each paragraph, in the probes' order.
        paragraphs_summed: likewise, summed over target tokens.
        settings: ``once`` or ``paraphrase`` of each paragraph.
        probe_rows, probe_items: rows of the tables ``probes`` and ``probe_items``, without run
            and step.
        downstream: rows of the table ``downstream`` with the ``items`` of each task.
        perplexity: a row of the table ``perplexity``.
        entropy_nats: H(θ), the sum over layers; entropy_stderr its jackknife error.
        measures: rows of the table ``measures``, without run and when.
    """

    knowledge: float | None = None
    knowledge_summed: float | None = None
    paragraphs: list[float] = field(default_factory=list)
    paragraphs_summed: list[float] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    probe_rows: list[dict[str, Any]] = field(default_factory=list)
    probe_items: list[dict[str, Any]] = field(default_factory=list)
    downstream: list[dict[str, Any]] = field(default_factory=list)
    perplexity: dict[str, Any] | None = None
    entropy_nats: float | None = None
    entropy_stderr: float | None = None
    measures: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Snapshot:
        """The inverse of :meth:`to_json`."""
        return cls(**values)

    @property
    def totals(self) -> dict[str, float]:
        """The measures' only values, or those over layers."""
        rows = (row for row in self.measures if row["layer"] is None and row["value"] is not None)
        return {row["measure"]: row["value"] for row in rows}

    @property
    def accuracy(self) -> float | None:
        """P, the mean over tasks, a fraction; None without tasks."""
        if not self.downstream:
            return None
        return float(np.mean([row["value"] for row in self.downstream]))

    def task_scores(self) -> list[TaskScore]:
        """What ``core.acquisition.forgetting_interval`` takes."""
        return [
            TaskScore(row["task"], row["value"], _number(row["stderr"]), row["items"])
            for row in self.downstream
        ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def take_snapshot(
    model: Any,
    study: ContinualStudy,
    questions: Questions,
    *,
    probes_only: bool = False,
    workers: Workers | None = None,
) -> Snapshot:
    """Evaluate a model in memory as the study says (or on the probes alone).

    Args:
        model: the same on every worker, or sharded among them.
        workers: who shares the work; call it on every one, and each gets the whole snapshot.

    Raises:
        CheckpointError: a result is not finite.
        DataError: a probe or an item is too long for the model.
    """
    values: dict[str, Any] = {}
    if questions.probes:
        with autocast(model, study.evaluation_dtype):
            values |= _probe_values(model, study, questions.probes, workers)
    if probes_only:
        return Snapshot(**values)
    if (downstream := study.downstream) is not None:
        with autocast(model, study.evaluation_dtype):
            results = run_downstream(
                model,
                questions.tokenizer,
                downstream.tasks,
                data_dir=downstream.data,
                limit=downstream.limit,
                batch_tokens=downstream.batch_tokens,
                own_tasks=downstream.own_tasks,
                workers=workers,
            )
        values["downstream"] = [
            {**result.row(), "items": [float(i) for i in result.items]} for result in results
        ]
    if study.held_out is not None and (corpus := questions.held_out) is not None:
        with autocast(model, study.evaluation_dtype):
            perplexity = held_out_perplexity(
                model,
                corpus.input_ids,
                corpus.lengths,
                batch_size=study.held_out.batch_size,
                workers=workers,
            )
        values["perplexity"] = {"corpus": corpus.name, **perplexity.row()}
    if study.entropy is not None and questions.entropy is not None:
        with autocast(model, study.evaluation_dtype):
            measured = _measure(model, study.entropy, questions.entropy, workers or Workers())
        sums = measured[0][1]
        entropy = evaluate(sums, ["knowledge_entropy"]).row("knowledge_entropy")
        if not math.isfinite(entropy.value):
            raise CheckpointError("The knowledge entropy is not finite; the model is broken.")
        values |= {"entropy_nats": entropy.value, "entropy_stderr": entropy.stderr}
        values["measures"] = _rows(measured, questions.entropy)
    return Snapshot(**values)


def _measure(
    model: Any, text: MeasuredText, corpus: Corpus, workers: Workers
) -> list[tuple[list[str], GroupSums]]:
    """The study's measures with their sums; the first sums are knowledge entropy's, too.

    Workers share the passes, except those of interventions, which each makes whole.
    """
    for own in text.own_measures:
        use_own_measure(own)  # a study that came from another process is not validated anew
    changing = [name for name in text.measures if interventions_of(name)]
    plain = [name for name in text.measures if name not in changing]
    shared = ("knowledge_entropy", *plain)
    measured = [(plain, shared_sums(model, corpus, shared, text.batch_size, workers))]
    if changing:
        sums = score_instances(
            model,
            corpus.input_ids,
            corpus.lengths,
            measures=changing,
            num_instances=corpus.num_instances,
            group_sizes=corpus.group_sizes,
            batch_size=text.batch_size,
        )
        measured.append((changing, sums))
    return measured


def _rows(measured: list[tuple[list[str], GroupSums]], corpus: Corpus) -> list[dict[str, Any]]:
    rows = [row for names, sums in measured if names for row in evaluate(sums, names).rows]
    bad = next((r for r in rows if r.reason is None and not math.isfinite(r.value)), None)
    if bad is not None:
        raise CheckpointError(f"{bad.measure} is {bad.value}; the model is broken.")
    return [
        {
            "corpus": corpus.name,
            "layer": row.layer,
            "measure": row.measure,
            "value": row.value if math.isfinite(row.value) else None,
            "stderr": row.stderr if math.isfinite(row.stderr) else None,
            "unit": row.unit,
        }
        for row in rows
    ]


def _probe_values(
    model: Any, study: ContinualStudy, probes: Sequence[Probe], workers: Workers | None
) -> dict[str, Any]:
    scores = score_probes(model, probes, batch_tokens=study.probes.batch_tokens, workers=workers)
    if not np.isfinite(scores.logprob_summed).all():
        raise CheckpointError("The probes' log probabilities are not finite; the model is broken.")
    labels, per_token = scores.paragraphs()
    _, summed = paragraph_means(
        scores.logprob_summed, [(probe.setting, probe.instance) for probe in scores.probes]
    )
    return {
        "knowledge": float(per_token.mean()),
        "knowledge_summed": float(summed.mean()),
        "paragraphs": per_token.tolist(),
        "paragraphs_summed": summed.tolist(),
        "settings": [setting for setting, _ in labels],
        "probe_rows": scores.by_level(),
        "probe_items": scores.items(),
    }


def coefficient_sums(
    model: Any, corpus: Corpus, batch_size: int, workers: Workers | None = None
) -> GroupSums:
    """Sums of |C| over a corpus; ``.mean("coefficients")`` is C̄ [n_layers, d_mlp].

    Args:
        workers: who shares the passes; all get the sums.
    """
    return shared_sums(model, corpus, ("knowledge_entropy",), batch_size, workers or Workers())


def acquired(before: Snapshot, after: Snapshot, *, summed: bool = False) -> Interval | None:
    """A with its interval over paragraphs; None without probes."""
    if not before.paragraphs:
        return None
    pair = [s.paragraphs_summed if summed else s.paragraphs for s in (before, after)]
    return acquisition_interval(pair[0], pair[1], strata=before.settings)


def forgotten(before: Snapshot, after: Snapshot) -> Interval | None:
    """F with its interval over items; None without downstream tasks."""
    if not before.downstream:
        return None
    return forgetting_interval(before.task_scores(), after.task_scores())
