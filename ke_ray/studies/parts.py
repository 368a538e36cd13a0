"""Groups of keys that several kinds of study have."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ke_ray.config import Key, Strict

TextName = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the text in results"),
]
Control = Literal["random", "matched_norm", "attention_temperature"]
CONTROLS: tuple[str, ...] = get_args(Control)
Sampling = Annotated[
    Literal["spread", "first"],
    Field(description="instances spread over a source of documents, or its first ones"),
]


class CheckpointSelection(Strict):
    """Checkpoints: a SPEC, and which of the checkpoints that it names."""

    spec: str = Field(description="folder, glob, Hugging Face repo, native OLMo folder/URL, or CSV")
    revisions: str | None = Field(None, description="glob over revision or checkpoint names")
    steps: str | None = Field(None, description="'a:b', both ends included, either may be empty")
    every: int | None = Field(
        None, ge=1, description="keep every n-th of the remaining checkpoints"
    )
    limit: int | None = Field(
        None, ge=1, description="keep at most this many of the remaining checkpoints, evenly spaced"
    )
    step_pattern: str | None = Field(
        None,
        description="regular expression for names that are not understood: one group gives the "
        "step, or named groups step, tokens, words, stage, branch, seed",
    )
    tokens_per_step: int | None = Field(
        None,
        ge=1,
        description="batch size × sequence length, by which steps become tokens where no name "
        "counts tokens",
    )

    def options(self) -> dict[str, Any]:
        """The selection as arguments of ``find_checkpoints`` beside the SPEC."""
        names = [name for name in CheckpointSelection.model_fields if name != "spec"]
        return {name: getattr(self, name) for name in names}


class EvaluationText(Strict):
    """Text on which a model is evaluated before and after training or resuscitation."""

    name: TextName = "entropy"
    source: str = Field(description="any source that a scan reads")
    num_instances: int = Field(64, ge=1, description="instances read from the source")
    sequence_length: int | None = Field(
        None, ge=2, description="tokens per instance; null: sequence_length of the study"
    )
    sampling: Sampling = "spread"
    batch_size: int = Key(4, affects_result=False, ge=1, description="instances per forward pass")


class Resuscitation(Strict):
    """Algorithm 1 applied in memory after load (``ke_ray.core.resuscitation``)."""

    ratio: float = Field(gt=0, le=1, description="share of memories per layer to scale")
    factor: float = Field(
        gt=0, description="amplifying factor; temperature of the attention control"
    )
    control: Control | None = Field(
        None, description="a control in place of Algorithm 1; null: Algorithm 1"
    )
    seed: int = Field(0, ge=0, description="seed of the rows that control 'random' scales")
    coefficients: str | None = Field(
        None,
        description="scan folder, or mlp_average_coefficients.pt, with mean coefficients; null: "
        "they are measured first",
    )
    allow_mismatch: bool = Key(
        False,
        affects_result=False,  # without it, a run whose weights differ has no result
        description="accept mean coefficients that were measured on other weights",
    )


class TrackingSettings(Strict):
    """Where runs are logged with MLflow."""

    enabled: bool = Field(True, description="log runs to MLflow")
    uri: str | None = Field(
        None, description="default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )
    experiment: str | None = Field(None, description="default: MLFLOW_EXPERIMENT_NAME, else ke_ray")
    tags: dict[str, str] = Field(default_factory=dict, description="MLflow tags of every run")

    @model_validator(mode="after")
    def _no_password(self) -> TrackingSettings:
        if self.uri and "://" in self.uri and "@" in self.uri.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError(
                "the tracking URI holds a user name or password, and studies are logged; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


def study_label(study: Any) -> str:
    """What MLflow and Prometheus call a study: its name, else its output folder's."""
    return getattr(study, "name", None) or study.output.rstrip("/").rsplit("/", 1)[-1]


def is_loopback(uri: str) -> bool:
    """Whether a URI's host is the machine itself, whichever that is."""
    try:
        host = urlsplit(uri).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        address = ip_address(host)
    except ValueError:  # a name, or nothing that is a URI
        return False
    return address.is_loopback or address.is_unspecified
