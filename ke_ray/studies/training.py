"""Training studies: pretraining a checkpoint series, and continual learning from checkpoints.

:class:`TrainingSettings` holds what both share. Derived numbers (warm-up steps, steps of the
checkpoints, rows of a worker) are computed here and nowhere else, so that a dry run prints what a
run does.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ke_ray.config import Key, Strict
from ke_ray.studies.parts import TrackingSettings

#: Elements of the largest [tokens, vocabulary] in memory (``ke_ray.training.loss``): 128 MiB of
#: float32.
LOGITS_AT_ONCE = 2**25


class OptimizerSettings(Strict):
    """AdamW. Embeddings, norms and biases are never decayed (docs/science.md#training-recipe)."""

    learning_rate: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="global L2 norm; null: no clipping")

    @model_validator(mode="after")
    def _betas(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class ScheduleSettings(Strict):
    """Learning rate over steps, as factors of the peak; step s is the s-th update, from 1."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, le=1, description="of all steps")
    warmup_steps: int | None = Field(None, ge=0, description="in place of warmup_fraction")
    start_factor: float = Field(0.1, ge=0, le=1, description="where the linear warm-up starts")
    final_factor: float = Field(0.1, ge=0, le=1, description="where the decay ends")

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up out of ``num_steps``."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, num_steps)
        return round(self.warmup_fraction * num_steps)


class TrainingSettings(Strict):
    """Settings that every training study has."""

    name: str | None = Key(
        None, affects_result=False, description="MLflow run name; default: the output folder's name"
    )
    output: str = Key(affects_result=False, description="folder or URI for the results")
    sequence_length: int = Field(1024, ge=2, description="T, tokens per row")
    global_batch_size: int = Field(128, ge=1, description="B, rows per step over all workers")
    micro_batch_size: int | None = Key(
        None,
        affects_result=False,
        ge=1,
        description="rows per forward pass; null: all rows of a worker",
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast; weights and optimizer stay float32"
    )
    activation_checkpointing: bool = Key(
        False, affects_result=False, description="recompute activations backwards to save memory"
    )
    compile: bool = Key(
        False, affects_result=False, description="torch.compile, one decoder layer at a time"
    )
    num_workers: int = Key(
        1, affects_result=False, ge=1, description="processes that share each step's rows"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="workers replicate (ddp) or shard (fsdp) the model; under bfloat16 the two "
        "round differently",
    )
    use_gpu: bool | None = Key(
        None, affects_result=False, description="one GPU per worker; null: where there is one"
    )
    gpu_memory_gib: float | None = Key(
        None,
        affects_result=False,
        gt=1,
        description="memory of one GPU in GiB, to refuse what does not fit; null: this machine's",
    )
    cpus_per_worker: int | None = Key(
        None, affects_result=False, ge=1, description="null: an even share of the CPUs"
    )
    max_failures: int = Key(
        3, affects_result=False, ge=0, description="how many worker failures to recover from"
    )
    save_every: int | None = Key(
        None,
        affects_result=False,
        ge=1,
        description="steps between training states; null: a tenth of the steps",
    )
    save_every_minutes: float | None = Key(
        10.0,
        affects_result=False,
        gt=0,
        description="minutes between training states, besides save_every; null: no limit",
    )
    keep_state: bool = Key(
        False, affects_result=False, description="keep the last training state after the run"
    )
    log_every: int | None = Key(
        None,
        affects_result=False,
        ge=1,
        description="steps between readings of the loss; null: 1 on CPU, 10 on GPU",
    )
    mlflow: TrackingSettings = Key(TrackingSettings(), affects_result=False)

    @model_validator(mode="after")
    def _divisible(self) -> TrainingSettings:
        if self.global_batch_size % self.num_workers:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by num_workers "
                f"{self.num_workers}; change one of them"
            )
        local = self.global_batch_size // self.num_workers
        if self.micro_batch_size and local % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not divisible by num_workers "
                f"{self.num_workers} x micro_batch_size {self.micro_batch_size}: each worker has "
                f"{local} rows; choose a micro_batch_size that divides them"
            )
        return self

    @property
    def rows_per_forward(self) -> int:
        """Rows of one forward pass on one worker."""
        return self.micro_batch_size or self.global_batch_size // self.num_workers

    def state_interval(self, num_steps: int) -> int:
        """Steps between two saved training states."""
        return self.save_every or max(1, math.ceil(num_steps / 10))


class ModelShape(Strict):
    """Architecture and sizes of a decoder with fresh weights."""

    model_type: str = Field("olmo", description="transformers' name of the architecture")
    n_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    d_mlp: int = Field(ge=1, description="memories per layer")
    n_heads: int = Field(ge=1)
    tie_embeddings: bool = Field(True, description="use the embedding as the output head")
    max_positions: int | None = Field(None, ge=2, description="null: sequence_length")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further keys of the transformers config"
    )

    @model_validator(mode="after")
    def _heads(self) -> ModelShape:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        return self


class Biographies(Strict):
    """The generated corpus (``ke_ray.data.biographies``): invented people, and new ones to inject.

    Its documents, facts, questions and task file are written to ``<output>/world/``.
    """

    num_people: int = Field(64, ge=4)
    documents_per_person: int = Field(48, ge=1)
    skew: float = Field(
        0.0,
        ge=0,
        le=5,
        description="documents of the person of rank r in proportion to 1/r**skew, one at least; "
        "their mean stays documents_per_person",
    )
    num_new_people: int = Field(16, ge=2, description="people to inject; none is in the corpus")
    num_once: int | None = Field(
        None, ge=0, description="new people injected only once; null: 6 of 13"
    )
    num_other_people: int = Field(
        32,
        ge=1,
        description="people in other_documents.jsonl.gz alone, for continual learning",
    )
    num_questions: int = Field(200, ge=4)
    seed: int = Field(0, ge=0)


class PretrainData(Strict):
    """Generated biographies or documents from anywhere; a tokenizer given or trained."""

    biographies: Biographies | None = None
    source: str | None = Field(None, description="documents: file, folder, glob, URL, hf:NAME")
    tokenizer: str | None = Field(None, description="tokenizer.json, folder or repo")
    vocab_size: int | None = Field(None, ge=260, description="train a BPE of this size instead")
    eos_token_id: int | None = Field(None, ge=0, lt=2**31, description="default: the tokenizer's")
    num_instances: int | None = Field(None, ge=1, description="rows; null: all of them")

    @model_validator(mode="after")
    def _one_of_each(self) -> PretrainData:
        if (self.biographies is None) == (self.source is None):
            raise ValueError("give exactly one of data.biographies and data.source")
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError("give exactly one of data.tokenizer and data.vocab_size")
        return self


class CheckpointSteps(Strict):
    """Steps whose weights are kept as Hugging Face folders: a list, or a number with a spacing."""

    steps: tuple[int, ...] | None = Field(None, description="explicit steps; 0 is allowed")
    number: int | None = Field(None, ge=1, description="how many steps, including the last")
    spacing: Literal["log", "linear"] = "log"
    first: int | None = Field(None, ge=1, description="first step of the log spacing")
    include_start: bool = Field(False, description="also keep step 0, in addition to number")

    @model_validator(mode="after")
    def _one(self) -> CheckpointSteps:
        if (self.steps is None) == (self.number is None):
            raise ValueError("give exactly one of checkpoints.steps and checkpoints.number")
        return self

    def resolve(self, num_steps: int) -> tuple[int, ...]:
        """The steps, ascending; the last step is always among them.

        Raises:
            ValueError: steps outside [0, num_steps], or more of them than there are steps.
        """
        if self.steps is not None:
            wrong = [step for step in self.steps if not 0 <= step <= num_steps]
            if wrong:
                raise ValueError(f"checkpoint steps {wrong} lie outside 0..{num_steps}")
            return tuple(sorted({*self.steps, num_steps}))
        number = self.number or 1
        if number > num_steps:
            raise ValueError(f"{number} checkpoints need at least as many steps, not {num_steps}")
        if self.spacing == "linear":
            steps = [round(num_steps * (i + 1) / number) for i in range(number)]
        else:
            first = min(self.first or max(1, num_steps // 32), num_steps)
            ratio = (num_steps / first) ** (1 / max(1, number - 1))
            steps = [round(first * ratio**i) for i in range(number)]
            steps[-1] = num_steps
        for i in range(1, number):  # close steps round to the same one: push them apart
            steps[i] = max(steps[i], steps[i - 1] + 1)
        for i in range(number - 1, -1, -1):
            steps[i] = min(steps[i], num_steps - (number - 1 - i))
        return (0, *steps) if self.include_start else tuple(steps)


class PretrainStudy(TrainingSettings):
    """``ke-ray pretrain``: a model from scratch, kept at many steps."""

    kind: Literal["pretrain"] = "pretrain"
    model: ModelShape
    data: PretrainData
    num_steps: int = Field(ge=1, description="updates")
    seed: int = Field(0, ge=0, description="seed of the initial weights and of the order of rows")
    checkpoints: CheckpointSteps = CheckpointSteps(number=10)

    @model_validator(mode="after")
    def _steps(self) -> PretrainStudy:
        self.checkpoints.resolve(self.num_steps)
        positions = self.model.max_positions
        if positions is not None and positions < self.sequence_length:
            raise ValueError(
                f"sequence_length {self.sequence_length} exceeds model.max_positions {positions}"
            )
        return self

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps whose weights are kept."""
        return self.checkpoints.resolve(self.num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.num_steps * self.global_batch_size * self.sequence_length
