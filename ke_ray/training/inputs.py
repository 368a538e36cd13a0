"""What a continual-learning run reads: corpus, injections, probes, held-out text.

All of it is made before the first step (and, by the driver, before the first worker starts), so
that bad input is one message and no half-finished run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.errors import CheckpointSpecError, DataError
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.snapshot import Asked

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ke_ray.checkpoints.reference import CheckpointRef
    from ke_ray.data.facts import FactSet
    from ke_ray.data.injection import InjectionPlan
    from ke_ray.data.training_set import PackedDataset


@dataclass(frozen=True)
class StartConfig:
    """What a starting checkpoint says about its tokens."""

    tokenizer: Tokenizer
    tokenizer_place: str
    eos_token_id: int
    vocab_size: int
    max_positions: int | None


@dataclass(frozen=True)
class RunInputs:
    """Everything one run needs but its model.

    Attributes:
        rows: the training rows of one seed.
        num_steps: epochs · (N // B).
        plan: what is injected where; None: nothing.
        asked: what snapshots ask.
        probe_steps: completed steps after which the probes are asked; 0 and the last among them.
    """

    start: StartConfig
    rows: PackedDataset
    num_steps: int
    plan: InjectionPlan | None
    asked: Asked
    probe_steps: tuple[int, ...]


def read_start(study: ContinualStudy, ref: CheckpointRef, folder: str) -> StartConfig:
    """Tokenizer and sizes of a checkpoint that lies in ``folder``; reads no weights.

    Raises:
        CheckpointSpecError: no tokenizer, no end-of-text id, or fewer positions than a row has.
    """
    from ke_ray.checkpoints.reference import find_tokenizer
    from ke_ray.data.tokenizer import load_tokenizer
    from ke_ray.models.loading import load_config

    config = load_config(folder)
    found = find_tokenizer(folder)
    place = study.tokenizer or (str(found) if found else None)
    if place is None:
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
    return StartConfig(load_tokenizer(place), place, int(eos), int(config.vocab_size), positions)


def cache_dir(study: ContinualStudy) -> str:
    """Where packed corpora lie: local, whatever the output is."""
    if study.cache_dir is not None:
        return storage.join(study.cache_dir, "data")
    if storage.is_local(study.output):
        return storage.join(study.output, "data")
    return str(Path.home() / ".cache" / "ke_ray" / "data")


def load_inputs(study: ContinualStudy, start: StartConfig, seed: int) -> RunInputs:
    """Corpus, injection plan and probes of one run.

    Raises:
        DataError: corpus too small, a schedule that does not fit the run, a probe too long, …
    """
    from ke_ray.data.training_set import prepare_training_set

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
    probes: Sequence[Any] = ()
    if fact_sets:
        from ke_ray.data.probes import build_probes

        probes = build_probes(fact_sets, start.tokenizer, max_positions=start.max_positions)
    asked = Asked(
        start.tokenizer,
        tuple(probes),
        _corpus(study, start, study.held_out),
        _corpus(study, start, study.entropy),
    )
    return RunInputs(start, rows, num_steps, plan, asked, probe_steps(study, plan, num_steps))


def _load_facts(study: ContinualStudy) -> list[FactSet]:
    from ke_ray.data.facts import load_facts

    keys = study.injection
    if keys is None:
        return []
    found = []
    for setting, place, limit in (
        ("paraphrase", keys.paraphrase, keys.limit_paraphrase),
        ("once", keys.once, keys.limit_once),
    ):
        if place is None:
            continue
        facts = load_facts(place, setting)
        if limit is not None and limit > len(facts.facts):
            raise DataError(
                f"injection.limit_{setting} is {limit}, but '{place}' has {len(facts.facts)} facts."
            )
        found.append(replace(facts, facts=facts.facts[:limit]))
    return found


def _plan(
    study: ContinualStudy, start: StartConfig, fact_sets: Sequence[FactSet], num_steps: int
) -> InjectionPlan | None:
    from ke_ray.data.injection import plan_injections
    from ke_ray.data.injection_schedule import load_schedule, schedule_from_facts

    keys = study.injection
    if keys is None:
        return None
    if keys.schedule is not None:
        schedule = load_schedule(keys.schedule)
    else:
        schedule = schedule_from_facts(fact_sets, num_injections=keys.count)
    plan = plan_injections(
        schedule,
        num_steps=num_steps,
        global_batch=study.global_batch_size,
        sequence_length=study.sequence_length,
        epochs=study.epochs,
        interval=keys.every,
        tokenizer=start.tokenizer,
        eos_token_id=start.eos_token_id,
        facts=fact_sets,
        spread=keys.spread,
    )
    plan.check_vocabulary(start.vocab_size)
    return plan


def probe_steps(
    study: ContinualStudy, plan: InjectionPlan | None, num_steps: int
) -> tuple[int, ...]:
    """Completed steps after which the probes are asked, ascending; 0 and the last among them.

    Raises:
        DataError: a step that the run does not have.
    """
    keys = study.probes
    late = [step for step in keys.steps if not 0 <= step <= num_steps]
    if late:
        raise DataError(f"probes.steps {late} lie outside the run's steps 0..{num_steps}.")
    steps = {0, num_steps, *keys.steps}
    if keys.every is not None:
        steps |= set(range(keys.every, num_steps, keys.every))
    if keys.around_injections and plan is not None:
        for step in plan.injection_steps():
            steps |= {step - 1, step}
    return tuple(sorted(steps))


def _corpus(study: ContinualStudy, start: StartConfig, keys: Any) -> Any:
    from ke_ray.data.corpus import build_corpus

    if keys is None:
        return None
    return build_corpus(
        keys.name,
        keys.source,
        num_instances=keys.num_instances,
        sequence_length=keys.sequence_length or study.sequence_length,
        tokenizer=start.tokenizer,
        eos_token_id=start.eos_token_id,
        vocab_size=start.vocab_size,
        sampling=getattr(keys, "sampling", "first"),  # held-out text stays the source's beginning
    )
