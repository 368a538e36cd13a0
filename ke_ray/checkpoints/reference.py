"""A reference to one checkpoint of a series: its location, and what its name tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.errors import CheckpointError
from ke_ray.secrets import redact
from ke_ray.storage import is_local, local_path

CheckpointFormat = Literal["hf", "hub", "native", "nanochat", "lightning", "dcp"]


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint that is listed, not yet fetched; small, hashable and picklable.

    Attributes:
        name: unique within its listing and usable as a file name.
        location: a local folder or file, an fsspec URI of a folder, an ``http(s)://`` base URL, or
            ``hf://org/repo`` or ``hf://org/repo:subfolder`` on the Hugging Face Hub.
        format: ``hf`` (``config.json`` and weights), ``hub`` (the same, on the Hub),
            ``native`` (OLMo's own ``config.yaml`` with ``model.pt`` or ``model.safetensors``), or
            a training tool's (:mod:`ke_ray.checkpoints.formats.local`).
        revision: branch, tag or commit on the Hub.
        commit: the commit the revision stood for when it was listed; fetched by it, so that a
            branch that moves meanwhile cannot mix two states.
        step: optimizer step, from the name, the CSV list or ``trainer_state.json``.
        pretraining_tokens: tokens seen so far, from the name.
        stage: training stage, where the name has one (its steps restart at each stage).
        ingredient: the branch within a stage, where the name has one.
        series: architecture and sizes, where a folder's configuration tells them
            (:func:`ke_ray.checkpoints.find.series.series_label`).
        size_bytes: bytes to fetch, where known without fetching.
        weights_fingerprint: cheap identity of the weight *files*: ``lfs-sha256:…`` on the Hub
            (exact), ``sampled-sha256:…`` in folders (sizes and samples of the bytes).
        duplicate_of: name of the earliest checkpoint in the listing with the same weight files.
    """

    name: str
    location: str
    format: CheckpointFormat
    revision: str | None = None
    commit: str | None = None
    step: int | None = None
    pretraining_tokens: int | None = None
    stage: int | None = None
    ingredient: int | None = None
    series: str | None = None
    size_bytes: int | None = None
    weights_fingerprint: str | None = None
    duplicate_of: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it can be loaded from its location."""
        return self.format != "hub" and is_local(self.location)

    @property
    def repo(self) -> str | None:
        """``org/repo`` of a checkpoint on the Hub."""
        location = self.location.removeprefix("hf://")
        return location.partition(":")[0] if self.format == "hub" else None

    @property
    def subfolder(self) -> str:
        """The folder of a checkpoint in its Hub repository; empty at the repository's root."""
        return self.location.removeprefix("hf://").partition(":")[2] if self.repo else ""

    @property
    def label(self) -> str:
        """Its name in messages: location (no password) and, on the Hub, revision."""
        if not self.revision:
            return redact(self.location)
        return f"hf://{self.repo}@{self.revision}" + (f":{s}" if (s := self.subfolder) else "")


def order_key(ref: CheckpointRef) -> tuple[bool, int, int, int, bool, str]:
    """Sort key in training order: stage, ingredient, step; without a step last, by name.

    A final checkpoint follows the numbered one of its step, of which it may be a copy.
    """
    return (
        ref.step is None,
        ref.stage or 0,
        ref.ingredient or 0,
        ref.step or 0,
        parse_checkpoint_name(ref.name).step is None,
        ref.name,
    )


def local_folder(checkpoint: CheckpointRef | str | Path) -> Path:
    """The folder of a checkpoint on this machine.

    Raises:
        CheckpointError: it is elsewhere; fetch it through ``Store`` first.
    """
    if isinstance(checkpoint, CheckpointRef):
        if not checkpoint.is_local:
            raise CheckpointError(
                f"'{checkpoint.label}' is not on this machine; fetch it with "
                "ke_ray.checkpoints.fetch.cache.Store first."
            )
        checkpoint = checkpoint.location
    return local_path(checkpoint)


def find_tokenizer(checkpoint: CheckpointRef | str | Path) -> Path | None:
    """The ``tokenizer.json`` in a local checkpoint folder or one level up, or None."""
    folder = local_folder(checkpoint)
    candidates = (folder / "tokenizer.json", folder.parent / "tokenizer.json")
    return next((path for path in candidates if path.is_file()), None)
