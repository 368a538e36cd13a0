"""A scan study: which checkpoints, on which corpora, which measures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ke_ray.config import Key, Strict
from ke_ray.core.intervention import NUM_INSTANCES, NUM_SEEDS
from ke_ray.core.measures import DEFAULT_MEASURES, MEASURES, check_measures, needs_usage
from ke_ray.errors import UserError
from ke_ray.studies.architecture import ArchitectureKey
from ke_ray.studies.own_measure import read_own_measure
from ke_ray.studies.own_measures import name_of, use_own_measure
from ke_ray.studies.parts import CheckpointSelection, Resuscitation, Sampling, TrackingSettings

#: The measure that ``precision`` and ``stderr_nats`` are about.
PRECISE_MEASURE = "knowledge_entropy"


class ScanStudy(Strict):
    """``ke-ray scan``: knowledge entropy and its kin over a checkpoint series."""

    kind: Literal["scan"] = "scan"
    name: str | None = Key(
        None, affects_result=False, description="MLflow run name; default: the output folder's name"
    )
    checkpoints: CheckpointSelection
    data: dict[str, str] = Field(min_length=1, description="corpus name → source")
    num_instances: int = Field(2048, ge=1, description="N, instances per corpus")
    precision: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the knowledge-entropy curve: score as few of the N instances as have this "
        "paired error, as a share of the largest change between checkpoints; null: score all N",
    )
    stderr_nats: float | None = Field(
        None, gt=0, description="the same as an error in nats, in place of `precision`"
    )
    sequence_length: int = Field(2048, ge=2, description="T, tokens per instance")
    sampling: Sampling = "spread"
    tokenizer: str | None = Field(None, description="tokenizer.json, folder or repo")
    eos_token_id: int | None = Field(
        None, ge=0, lt=2**31, description="default: the model config's"
    )
    own_measures: tuple[str, ...] = Field(
        (), description="measures of your own, beside `measures`: FILE.py:NAME (docs/measures.md)"
    )
    measures: tuple[str, ...] = Field(
        DEFAULT_MEASURES, description="measures to compute", validate_default=True
    )
    top_k_fraction: float = Field(
        0.01, gt=0, le=1, description="of top_k_mass: share of memories counted"
    )
    dormant_threshold: float = Field(
        0.1, ge=0, description="of dormant_share: fraction of the mean below which memories count"
    )
    intervention_instances: int = Field(
        NUM_INSTANCES,
        ge=1,
        description="of measures by intervention: as many of the instances, evenly spread; "
        "below 64, intervals are too narrow",
    )
    noise_seeds: int = Field(
        NUM_SEEDS, ge=1, description="of sensitivity: draws of noise that it is the mean over"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="of the weights while they are scored; auto: bfloat16 on GPUs that have it, "
        "else float32",
    )
    matmul_precision: Literal["auto", "highest", "high"] = Field(
        "highest",
        description="of the model's float32 products; high: TF32 on devices that have it; auto: "
        "high on such GPUs, else highest",
    )
    device: Literal["auto", "cuda", "cpu"] = Key(
        "auto",
        affects_result=False,
        description="auto: GPUs where the cluster has any, else CPUs; cuda: waits for GPUs, never "
        "scores on CPUs; cpu: takes no GPU",
    )
    gpus_per_scorer: float = Key(
        1.0, affects_result=False, gt=0, le=1, description="below 1, scorers share a GPU"
    )
    batch_size: int = Key(4, affects_result=False, ge=1, description="instances per forward pass")
    num_actors: int | None = Key(
        None, affects_result=False, ge=1, description="scorers; null: one per GPU, else one per CPU"
    )
    max_actors: int | None = Key(
        None,
        affects_result=False,
        ge=1,
        description="scorers to grow to, beyond `num_actors`, while nodes join; their demand is "
        "what an autoscaler sees; null: as many as have a place when the scan starts",
    )
    cache_dir: str | None = Key(
        None,
        affects_result=False,
        description="folder for fetched checkpoints while they are in use",
    )
    cache_bytes: int | None = Key(
        None, affects_result=False, ge=1, description="disk budget of the cache per node"
    )
    prefetch: int = Key(
        1,
        affects_result=False,
        ge=1,
        le=16,
        description=(
            "checkpoints that a scorer fetches ahead, within cache_bytes; one is loaded ahead"
        ),
    )
    architecture: ArchitectureKey = Field(
        None, description="description of a decoder that ke_ray does not know, or a file with it"
    )
    resuscitation: Resuscitation | None = Field(
        None,
        description="scale memories after load; without coefficients, they are measured first, on "
        "the first corpus",
    )
    output: str = Key(affects_result=False, description="folder or URI for the results")
    mlflow: TrackingSettings = Key(TrackingSettings(), affects_result=False)

    def of_mixture(self) -> ScanStudy:
        """The study for mixtures of experts: by default also what knowledge entropy consists of.

        Raises:
            UserError: a measure zeroes coefficients, which they keep expert by expert.
        """
        if needs_usage(self.measures):
            masks = " and ".join(name for name in self.measures if needs_usage(name))
            raise UserError(
                f"'{self.checkpoints.spec}' holds mixtures of experts, whose coefficients are seen "
                f"expert by expert and cannot be zeroed; leave {masks} out of the measures"
            )
        if "measures" in self.model_fields_set:
            return self
        names = [name for name, measure in MEASURES.items() if measure.by_expert]
        study = self.model_copy(update={"measures": check_measures([*self.measures, *names])})
        study.model_fields_set.discard("measures")  # they are still the default
        return study

    @property
    def has_wanted_precision(self) -> bool:
        """Whether the scan may stop before all N instances are scored."""
        return self.precision is not None or self.stderr_nats is not None

    @model_validator(mode="after")
    def _one_precision(self) -> ScanStudy:
        if not self.has_wanted_precision:
            return self
        key = "stderr_nats" if self.precision is None else "precision"
        if self.precision is not None and self.stderr_nats is not None:
            raise ValueError(
                f"precision is {self.precision} and stderr_nats is {self.stderr_nats}; give one"
            )
        if PRECISE_MEASURE not in self.measures:
            raise ValueError(
                f"{key} is about {PRECISE_MEASURE}, which is not in measures "
                f"({', '.join(self.measures)}); add it, or leave {key} out"
            )
        if self.resuscitation is not None:
            raise ValueError(
                f"{key} and resuscitation do not go together; leave {key} out and choose "
                "num_instances"
            )
        return self

    @model_validator(mode="after")
    def _bounds_of_actors(self) -> ScanStudy:
        if self.max_actors is not None and self.max_actors < (self.num_actors or 1):
            raise ValueError(
                f"max_actors is {self.max_actors} and num_actors is {self.num_actors}; the pool "
                "grows from num_actors to max_actors"
            )
        return self

    @field_validator("own_measures")
    @classmethod
    def _registered(cls, references: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for reference in references:
                use_own_measure(read_own_measure(reference))
        except UserError as error:
            raise ValueError(str(error)) from error
        return references

    @field_validator("measures", mode="before")
    @classmethod
    def _one_text(cls, measures: Any) -> Any:
        if not isinstance(measures, str):
            return measures
        return tuple(name.strip() for name in measures.split(",") if name.strip())

    @field_validator("measures")
    @classmethod
    def _known(cls, measures: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        own = [name_of(reference) for reference in info.data.get("own_measures", ())]
        try:
            return check_measures([*measures, *own] if measures else measures)
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("data")
    @classmethod
    def _corpus_names(cls, data: dict[str, str]) -> dict[str, str]:
        for name in data:
            if not name or any(not (c.isalnum() or c in "._-") for c in name) or name[0] in ".-":
                raise ValueError(
                    f"'{name}' is no corpus name; use letters, digits, '.', '_' and '-'"
                )
        return data
