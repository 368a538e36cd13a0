"""Groups of keys that several kinds of study have."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ke_ray.config import Strict


class CheckpointSelection(Strict):
    """Which checkpoints: a SPEC and, of what it names, a selection."""

    spec: str = Field(description="folder, glob, Hugging Face repo, native OLMo folder/URL, or CSV")
    revisions: str | None = Field(None, description="glob over revision or checkpoint names")
    steps: str | None = Field(None, description="'a:b', both ends included, either may be empty")
    every: int | None = Field(None, ge=1, description="keep every n-th of what is left")
    limit: int | None = Field(None, ge=1, description="keep at most this many, evenly spaced")


class Resuscitation(Strict):
    """Algorithm 1 applied in memory after load (``ke_ray.core.resuscitation``)."""

    ratio: float = Field(gt=0, le=1, description="resuscitation ratio: share of rows scaled")
    factor: float = Field(gt=0, description="amplifying factor")
    control: Literal["random", "matched_norm", "attention_temperature"] | None = None
    seed: int = Field(0, ge=0, description="which random rows the control takes")
    coefficients: str | None = Field(
        None, description="scan folder, or mlp_average_coefficients.pt, with mean coefficients"
    )
    allow_mismatch: bool = Field(False, description="take coefficients of other weights")


class TrackingSettings(Strict):
    """Where runs are logged with MLflow."""

    enabled: bool = True
    uri: str | None = Field(
        None, description="default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )
    experiment: str | None = Field(None, description="default: MLFLOW_EXPERIMENT_NAME, else ke_ray")
    tags: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_password(self) -> TrackingSettings:
        if self.uri and "://" in self.uri and "@" in self.uri.split("://", 1)[1].split("/", 1)[0]:
            raise ValueError(
                "the tracking URI holds a user name or password, and studies are logged; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


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
