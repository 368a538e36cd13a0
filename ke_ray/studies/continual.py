"""Continual-learning studies: starts, corpus, injected facts, evaluation before and after.

Step arithmetic (the paper's in brackets): N instances [204,800] of T tokens [1,024] and a global
batch of B rows [128] give N // B steps an epoch [1,600]; k injections [10] then fall every
(N // B) // k steps [160].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ke_ray.config import Key, Strict
from ke_ray.errors import UserError, nearest
from ke_ray.studies.architecture import ArchitectureKey
from ke_ray.studies.own_measure import OwnMeasure, read_own_measure
from ke_ray.studies.parts import (
    CheckpointSelection,
    EvaluationText,
    Resuscitation,
    Sampling,
    TextName,
)
from ke_ray.studies.training import TrainingSettings

#: The names of ``ke_ray.evaluation.downstream.TASK_METRICS``, here without lm-eval.
ALL_TASKS = ("sciq", "winogrande", "arc_easy", "piqa", "hellaswag", "openbookqa")


class Starts(CheckpointSelection):
    """Starting checkpoints: a selection, thinned to a few from early to last."""

    nearest: tuple[int, ...] = Field(
        (), description="keep the remaining checkpoints nearest to these pretraining steps"
    )
    spread: int | None = Field(
        None,
        ge=1,
        description="keep this many of the remaining checkpoints, evenly spaced, including the "
        "first and the last",
    )


class TrainingCorpus(Strict):
    """The corpus to train on."""

    name: TextName = "corpus"
    source: str = Field(description="any source that a scan reads")
    num_instances: int | None = Field(
        None, ge=1, description="rows per epoch, drawn by seed; null: all rows of the corpus"
    )
    max_instances: int | None = Field(
        None, ge=1, description="tokenise at most this many rows, from the start of the source"
    )


def _read(given: Any) -> Any:
    """The file of ``FILE.py:NAME``, whose text from then on is part of the study."""
    if not isinstance(given, str):
        return given
    try:
        own = read_own_measure(given)
    except UserError as error:
        raise ValueError(str(error)) from error
    return replace(own, reference=given.rsplit("/", 1)[-1])


class MeasuredText(EvaluationText):
    """The text of knowledge entropy, on which more measures of a run's models can be taken."""

    own_measures: tuple[
        Annotated[OwnMeasure, BeforeValidator(_read), WithJsonSchema({"type": "string"})], ...
    ] = Field((), description="measures of your own: FILE.py:NAME (docs/measures.md)")
    measures: tuple[str, ...] = Field(
        (),
        description="measures before and after, beside knowledge entropy; objectives of a sweep "
        "may name them",
        validate_default=True,
    )

    @field_validator("own_measures")
    @classmethod
    def _registered(cls, own: tuple[OwnMeasure, ...]) -> tuple[OwnMeasure, ...]:
        from ke_ray.studies.own_measures import use_own_measure  # with numpy

        try:
            for each in own:
                use_own_measure(each)
        except UserError as error:
            raise ValueError(str(error)) from error
        return own

    @field_validator("measures")
    @classmethod
    def _known(cls, measures: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        from ke_ray.core.measures import check_measures
        from ke_ray.studies.own_measures import name_of

        own = [name_of(each.reference) for each in info.data.get("own_measures", ())]
        try:
            return check_measures([*measures, *own]) if measures or own else ()
        except UserError as error:
            raise ValueError(str(error)) from error


class InjectionSettings(Strict):
    """Facts and when they enter: by rule from two facts files, or from a schedule file."""

    paraphrase: str | None = Field(
        None, description="facts JSON; every injection shows each fact in another version"
    )
    once: str | None = Field(None, description="facts JSON; each fact is in one injection only")
    limit_paraphrase: int | None = Field(
        None, ge=1, description="inject only this many paraphrase facts, from the first"
    )
    limit_once: int | None = Field(
        None, ge=1, description="inject only this many once facts, from the first"
    )
    schedule: str | None = Field(
        None, description="JSON, YAML or Parquet schedule in place of the rule"
    )
    count: int | None = Field(
        None, ge=1, description="number of injections; null: the versions of a paraphrase fact"
    )
    every: int | None = Field(
        None, ge=1, description="steps between injections; null: evenly over the run"
    )
    spread: bool | None = Field(
        None,
        description="spread the texts over all rows of a step; null: where global_batch_size is "
        "below 128",
    )

    @model_validator(mode="after")
    def _something(self) -> InjectionSettings:
        if not (self.paraphrase or self.once):
            raise ValueError(
                "give injection.paraphrase, injection.once or both: the facts are also what is "
                "probed"
            )
        if self.schedule and self.count:
            raise ValueError("a schedule file has its own number of injections; leave out count")
        return self


class ProbeSettings(Strict):
    """Steps after which the facts are probed, besides the first and the last."""

    every: int | None = Field(None, ge=1, description="probe after every n-th step")
    steps: tuple[int, ...] = Field((), description="probe after these steps")
    around_injections: bool = Field(
        True,
        description="probe just before and just after each injection, and 1, 2, 4, 8, … steps "
        "later until the next",
    )
    batch_tokens: int | None = Key(
        None, affects_result=False, ge=1, description="tokens of one forward pass"
    )

    def resolve(self, injection_steps: Sequence[int], num_steps: int) -> tuple[int, ...]:
        """Completed steps after which the facts are probed, ascending; 0 and the last included.

        What is read off the curve behind an injection needs few points: its maximum within 50
        steps, and a decay in the logarithm of steps (docs/science.md#dynamics).
        """
        steps = {0, num_steps, *self.steps}
        if self.every is not None:
            steps |= set(range(self.every, num_steps, self.every))
        if self.around_injections:
            ends = [*injection_steps[1:], num_steps + 1]
            for step, end in zip(injection_steps, ends, strict=False):
                steps |= {step - 1, step}
                steps |= {
                    step + 2**k for k in range((end - step).bit_length()) if step + 2**k < end
                }
        return tuple(sorted(steps))


class DownstreamSettings(Strict):
    """P: zero-shot accuracy by lm-eval, before and after."""

    tasks: tuple[str, ...] = Field(ALL_TASKS, description="lm-eval tasks")
    own_tasks: dict[str, str] = Field(
        default_factory=dict, description="task name → JSON lines with context, choices, gold"
    )
    data: str | None = Field(
        None, description="folder with <task>/validation.jsonl; null: the Hugging Face Hub"
    )
    limit: int | None = Field(
        None, ge=1, description="use only this many items of each task, from the first"
    )
    batch_tokens: int | None = Key(
        None, affects_result=False, ge=1, description="tokens of one forward pass"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in ALL_TASKS:
                raise ValueError(
                    f"unknown task '{task}'.{nearest(task, ALL_TASKS)} Tasks: "
                    f"{', '.join(ALL_TASKS)}; one of your own goes under own_tasks"
                )
        return tasks

    @model_validator(mode="after")
    def _some(self) -> DownstreamSettings:
        if not self.tasks and not self.own_tasks:
            raise ValueError("name at least one task, or leave the downstream group out")
        return self


class EvaluationSettings(Strict):
    """How probes, tasks, perplexity and knowledge entropy are computed along a run."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the model's products while it is evaluated; null: as precision says"
    )


class HeldOutText(EvaluationText):
    """Held-out text of the old corpus, for perplexity: the beginning of its source."""

    name: TextName = "held_out"
    sampling: Sampling = "first"


class ContinualStudy(TrainingSettings):
    """``ke-ray continual``: one training run for each starting checkpoint and seed."""

    kind: Literal["continual"] = "continual"
    starts: Starts
    tokenizer: str | None = Field(None, description="file, folder or repo; null: the checkpoint's")
    eos_token_id: int | None = Field(None, ge=0, lt=2**31, description="null: the model config's")
    corpus: TrainingCorpus
    epochs: int = Field(1, ge=1)
    injection: InjectionSettings | None = None
    probes: ProbeSettings = ProbeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    downstream: DownstreamSettings | None = None
    held_out: HeldOutText | None = Field(
        None, description="text for perplexity before and after; null: none"
    )
    entropy: MeasuredText | None = Field(
        None,
        description="text for knowledge entropy and others before and after; null: none",
    )
    architecture: ArchitectureKey = Field(
        None, description="description of a decoder that ke_ray does not know, or a file with it"
    )
    resuscitation: Resuscitation | None = None
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="of the rows drawn and their order"
    )
    executor: Literal["ray", "inline"] = Key(
        "ray",
        affects_result=False,
        description="inline: in this process, without Ray; one worker only",
    )
    keep_final: bool = Key(
        True,
        affects_result=False,
        description="keep each run's final model as a Hugging Face folder",
    )
    cache_dir: str | None = Key(
        None, affects_result=False, description="for fetched checkpoints and packed corpora"
    )

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds {list(seeds)} must be different and not negative")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> ContinualStudy:
        if self.executor == "inline" and self.num_workers > 1:
            raise ValueError(f"executor inline has one worker, not num_workers {self.num_workers}")
        is_sharded = self.strategy == "fsdp" and self.num_workers > 1
        if is_sharded and (self.precision, self.evaluation_dtype) == ("bfloat16", "float32"):
            raise ValueError(
                "evaluation.dtype is float32, but fsdp workers gather their shards in the "
                "study's precision, bfloat16, also to evaluate; leave it out, or set precision: "
                "float32 or strategy: ddp"
            )
        if is_sharded and self.entropy is not None and self.entropy.measures:
            raise ValueError(
                f"entropy.measures is {', '.join(self.entropy.measures)}, but fsdp workers can "
                "measure knowledge entropy alone; leave it out, or set strategy: ddp"
            )
        if self.resuscitation and not (self.resuscitation.coefficients or self.entropy):
            raise ValueError(
                "resuscitation needs mean coefficients: name a scan folder in "
                "resuscitation.coefficients, or give the entropy group to measure them on"
            )
        return self

    @property
    def evaluation_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the model's products while it is evaluated."""
        return self.evaluation.dtype or self.precision
