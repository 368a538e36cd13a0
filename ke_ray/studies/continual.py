"""A continual-learning study: starts, corpus, what is injected, what is asked before and after.

Step arithmetic (the paper's in brackets): N instances [204,800] of T tokens [1,024] and a global
batch of B rows [128] give N // B steps an epoch [1,600]; k injections [10] then fall every
(N // B) // k steps [160].
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ke_ray.config import Key, Strict
from ke_ray.errors import nearest
from ke_ray.studies.parts import CheckpointSelection, Resuscitation
from ke_ray.studies.training import TrainingKeys

#: The names of ``ke_ray.evaluation.downstream.TASK_METRICS``, here without lm-eval.
ALL_TASKS = ("sciq", "winogrande", "arc_easy", "piqa", "hellaswag", "openbookqa")


class Starts(CheckpointSelection):
    """Starting checkpoints: a selection, and of it a few from early to last."""

    nearest: tuple[int, ...] = Field(
        (), description="of what is left the checkpoints nearest to these pretraining steps"
    )
    spread: int | None = Field(
        None, ge=1, description="of what is left so many at even places, first and last included"
    )


class TrainingCorpus(Strict):
    """What is trained on."""

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: str = Field(description="any source that a scan reads")
    num_instances: int | None = Field(
        None, ge=1, description="rows drawn by seed, an epoch; null: all there are"
    )
    max_instances: int | None = Field(None, ge=1, description="tokenise no more than the first")


class InjectionKeys(Strict):
    """Facts and when they enter: by rule from two facts files, or from a schedule file."""

    paraphrase: str | None = Field(None, description="facts JSON: another version each injection")
    once: str | None = Field(None, description="facts JSON: each in one injection only")
    limit_paraphrase: int | None = Field(None, ge=1, description="the first so many facts only")
    limit_once: int | None = Field(None, ge=1)
    schedule: str | None = Field(None, description="JSON, YAML or Parquet in place of the rule")
    count: int | None = Field(None, ge=1, description="injections; null: versions of a paraphrase")
    every: int | None = Field(None, ge=1, description="steps between injections; null: even")
    spread: bool | None = Field(None, description="texts over all rows; null: below batch 128")

    @model_validator(mode="after")
    def _something(self) -> InjectionKeys:
        if not (self.paraphrase or self.once):
            raise ValueError(
                "give injection.paraphrase, injection.once or both: the facts are also what is "
                "probed"
            )
        if self.schedule and self.count:
            raise ValueError("a schedule file has its own number of injections; leave out count")
        return self


class ProbeKeys(Strict):
    """When facts are asked, in completed steps; both ends always."""

    every: int | None = Field(None, ge=1, description="also every so many steps")
    steps: tuple[int, ...] = Field((), description="also after these steps")
    around_injections: bool = Field(
        True, description="also just before and just after each injecting step"
    )
    batch_tokens: int | None = Key(
        None, affects_result=False, ge=1, description="tokens of one forward pass"
    )


class DownstreamKeys(Strict):
    """P: zero-shot accuracy by lm-eval, before and after."""

    tasks: tuple[str, ...] = ALL_TASKS
    own_tasks: dict[str, str] = Field(
        default_factory=dict, description="name → JSON lines with context, choices, gold"
    )
    data: str | None = Field(None, description="folder with <task>/validation.jsonl; null: Hub")
    limit: int | None = Field(None, ge=1, description="the first so many items of a task")
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
    def _some(self) -> DownstreamKeys:
        if not self.tasks and not self.own_tasks:
            raise ValueError("name at least one task, or leave the downstream group out")
        return self


class HeldOutKeys(Strict):
    """Perplexity of held-out text of the old corpus, before and after."""

    name: str = Field("held_out", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: str
    num_instances: int = Field(64, ge=1)
    sequence_length: int | None = Field(None, ge=2, description="null: that of the study")
    batch_size: int = Key(8, affects_result=False, ge=1, description="instances per forward pass")


class EntropyKeys(Strict):
    """Knowledge entropy of the start and of the trained model, on the same instances."""

    name: str = Field("entropy", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    source: str
    num_instances: int = Field(64, ge=1)
    sequence_length: int | None = Field(None, ge=2, description="null: that of the study")
    sampling: Literal["spread", "first"] = Field(
        "spread", description="instances spread over a source of documents, or its first ones"
    )
    batch_size: int = Key(4, affects_result=False, ge=1, description="instances per forward pass")


class ContinualStudy(TrainingKeys):
    """``ke-ray continual``: one training run for each starting checkpoint and seed."""

    kind: Literal["continual"] = "continual"
    starts: Starts
    tokenizer: str | None = Field(None, description="file, folder or repo; null: the checkpoint's")
    eos_token_id: int | None = Field(None, ge=0, description="null: the model config's")
    corpus: TrainingCorpus
    epochs: int = Field(1, ge=1)
    injection: InjectionKeys | None = None
    probes: ProbeKeys = ProbeKeys()
    downstream: DownstreamKeys | None = None
    held_out: HeldOutKeys | None = None
    entropy: EntropyKeys | None = None
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
        if self.resuscitation and not (self.resuscitation.coefficients or self.entropy):
            raise ValueError(
                "resuscitation needs mean coefficients: name a scan folder in "
                "resuscitation.coefficients, or give the entropy group to measure them on"
            )
        return self
