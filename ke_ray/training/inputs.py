"""Inputs of a continual-learning run: corpus, injections, probes, held-out text.

All of them are made before the first step (and, by the driver, before the first worker starts), so
that bad input is one message and no half-finished run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.checkpoints.reference import CheckpointRef, find_tokenizer
from ke_ray.data.corpus import Corpus, build_corpus
from ke_ray.data.facts import FactSet, load_facts
from ke_ray.data.injection import InjectionPlan, plan_injections
from ke_ray.data.injection_schedule import load_schedule, schedule_from_facts
from ke_ray.data.probes import build_probes
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.data.training_set import PackedDataset, prepare_training_set
from ke_ray.errors import CheckpointSpecError, DataError
from ke_ray.models.architectures import use_description
from ke_ray.models.loading import load_config
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.parts import EvaluationText
from ke_ray.training.snapshot import Questions


@dataclass(frozen=True)
class StartConfig:
    """Tokenizer and sizes of a starting checkpoint."""

    tokenizer: Tokenizer
    eos_token_id: int
    vocab_size: int
    max_positions: int | None


@dataclass(frozen=True)
class RunInputs:
    """Everything one run needs but its model.

    Attributes:
        rows: the training rows of one seed.
        num_steps: epochs · (N // B).
        plan: which facts are injected where; None: none.
        questions: on which snapshots evaluate the model.
        probe_steps: completed steps after which the facts are probed, 0 and the last included.
    """

    start: StartConfig
    rows: PackedDataset
    num_steps: int
    plan: InjectionPlan | None
    questions: Questions
    probe_steps: tuple[int, ...]


def read_start(study: ContinualStudy, ref: CheckpointRef, folder: str) -> StartConfig:
    """Read tokenizer and sizes of the checkpoint in ``folder``, but no weights.

    Raises:
        CheckpointSpecError: no tokenizer, no end-of-text id, or fewer positions than a row has.
    """
    use_description(study.architecture)
    config = load_config(folder)
    tokenizer = study.tokenizer or find_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointSpecError(
            f"The checkpoint '{ref.label}' has no tokenizer.json; name its tokenizer with the key "
            "'tokenizer' (a file, a folder or a Hub repo)."
        )
    eos = study.eos_token_id
    if eos is None:
        eos = config.eos_token_id
        eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise CheckpointSpecError(
            f"The config of '{ref.label}' has no eos_token_id; give the key 'eos_token_id'."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and study.sequence_length > positions:
        raise CheckpointSpecError(
            f"sequence_length {study.sequence_length} exceeds the {positions} positions of "
            f"'{ref.label}'; choose a shorter one."
        )
    return StartConfig(load_tokenizer(str(tokenizer)), int(eos), int(config.vocab_size), positions)


def cache_dir(study: ContinualStudy) -> str:
    """The local folder for packed corpora, even where the output is remote."""
    if study.cache_dir is not None:
        return storage.join(study.cache_dir, "data")
    if storage.is_local(study.output):
        return storage.join(study.output, "data")
    return str(Path.home() / ".cache" / "ke_ray" / "data")


def load_inputs(study: ContinualStudy, start: StartConfig, seed: int) -> RunInputs:
    """Read the corpus, the injection plan and the probes of one run.

    Raises:
        DataError: corpus too small, a schedule that does not fit the run, a probe too long, …
    """
    rows = prepare_training_set(
        study.corpus.source,
        cache_dir(study),
        sequence_length=study.sequence_length,
        tokenizer=start.tokenizer,
        eos_token_id=start.eos_token_id,
        vocab_size=start.vocab_size,
        num_instances=study.corpus.num_instances,
        seed=seed,
        max_instances=study.corpus.max_instances,
    )
    num_steps = study.epochs * rows.steps_per_epoch(study.global_batch_size)
    fact_sets = _load_facts(study)
    plan = _plan(study, start, fact_sets, num_steps)
    questions = _questions(study, start, fact_sets)
    return RunInputs(start, rows, num_steps, plan, questions, probe_steps(study, plan, num_steps))


def load_questions(study: ContinualStudy, start: StartConfig) -> Questions:
    """What a start is evaluated on; the training corpus is not read.

    Raises:
        DataError: facts or texts are missing, or a probe is too long.
    """
    return _questions(study, start, _load_facts(study))


def _questions(
    study: ContinualStudy, start: StartConfig, fact_sets: Sequence[FactSet]
) -> Questions:
    probes = (
        build_probes(fact_sets, start.tokenizer, max_positions=start.max_positions)
        if fact_sets
        else ()
    )
    return Questions(
        start.tokenizer,
        tuple(probes),
        _corpus(study, start, study.held_out),
        _corpus(study, start, study.entropy),
    )


def _load_facts(study: ContinualStudy) -> list[FactSet]:
    injection = study.injection
    if injection is None:
        return []
    fact_sets = []
    for setting, source, limit in (
        ("paraphrase", injection.paraphrase, injection.limit_paraphrase),
        ("once", injection.once, injection.limit_once),
    ):
        if source is None:
            continue
        facts = load_facts(source, setting)
        if limit is not None and limit > len(facts.facts):
            raise DataError(
                f"injection.limit_{setting} is {limit}, but '{source}' has {len(facts.facts)} "
                "facts."
            )
        fact_sets.append(replace(facts, facts=facts.facts[:limit]))
    return fact_sets


def _plan(
    study: ContinualStudy, start: StartConfig, fact_sets: Sequence[FactSet], num_steps: int
) -> InjectionPlan | None:
    injection = study.injection
    if injection is None:
        return None
    if injection.schedule is not None:
        schedule = load_schedule(injection.schedule)
    else:
        schedule = schedule_from_facts(fact_sets, num_injections=injection.count)
    plan = plan_injections(
        schedule,
        num_steps=num_steps,
        global_batch=study.global_batch_size,
        sequence_length=study.sequence_length,
        epochs=study.epochs,
        interval=injection.every,
        tokenizer=start.tokenizer,
        eos_token_id=start.eos_token_id,
        facts=fact_sets,
        spread=injection.spread,
    )
    plan.check_vocabulary(start.vocab_size)
    return plan


def probe_steps(
    study: ContinualStudy, plan: InjectionPlan | None, num_steps: int
) -> tuple[int, ...]:
    """Completed steps after which the facts are probed, ascending; 0 and the last included.

    Raises:
        DataError: a step that the run does not have.
    """
    late = [step for step in study.probes.steps if not 0 <= step <= num_steps]
    if late:
        raise DataError(f"probes.steps {late} lie outside the run's steps 0..{num_steps}.")
    return study.probes.resolve(plan.injection_steps() if plan else (), num_steps)


def _corpus(
    study: ContinualStudy, start: StartConfig, text: EvaluationText | None
) -> Corpus | None:
    if text is None:
        return None
    return build_corpus(
        text.name,
        text.source,
        num_instances=text.num_instances,
        sequence_length=text.sequence_length or study.sequence_length,
        tokenizer=start.tokenizer,
        eos_token_id=start.eos_token_id,
        vocab_size=start.vocab_size,
        sampling=text.sampling,
    )
