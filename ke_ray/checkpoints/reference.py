"""A reference to one checkpoint of a series: its location, and what its name tells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ke_ray.checkpoints.find.names import CheckpointName, parse_checkpoint_name
from ke_ray.core.position import POSITION, position_key
from ke_ray.errors import CheckpointError
from ke_ray.secrets import redact
from ke_ray.storage import is_local, local_path

CheckpointFormat = Literal["hf", "hub", "native", "nanochat", "lightning", "dcp", "state"]


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
        step: optimizer step, from the name, the CSV list or ``trainer_state.json``; some series
            start again at each stage.
        tokens: training tokens read so far, over all stages, from the names or the steps.
        words: words of training text read so far, where the name counts words.
        stage: number of the training stage, where the name has one.
        stage_label: the stage as the name has it, such as ``stage2`` or ``anneal``.
        seed: seed of the training run, where a name has one: a number or a word.
        branch: what tells apart runs that start from one checkpoint, such as ``ingredient1``.
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
    tokens: int | None = None
    words: int | None = None
    stage: int | None = None
    stage_label: str | None = None
    seed: str | None = None
    branch: str | None = None
    series: str | None = None
    size_bytes: int | None = None
    weights_fingerprint: str | None = None
    duplicate_of: str | None = None

    @property
    def is_numbered(self) -> bool:
        """Whether it is known how far training had come."""
        return any(number is not None for number in (self.step, self.tokens, self.words))

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


def position(ref: CheckpointRef) -> dict[str, Any]:
    """Where in which training run it stands, as columns of a row."""
    return {name: getattr(ref, name) for name in POSITION}


def with_name(ref: CheckpointRef, name: CheckpointName) -> CheckpointRef:
    """The same reference at the position that its name gives."""
    return replace(ref, **{field: getattr(name, field) for field in POSITION})


def order_key(ref: CheckpointRef) -> tuple[Any, ...]:
    """Sort key in training order, see :func:`ke_ray.core.position.position_key`.

    Those whose number is unknown come by name in folders, as the Hub lists them there, ``main``
    after them. A final checkpoint follows the numbered one of its step, of which it may be a copy.
    """
    seed, is_unknown, *others = position_key(position(ref))
    return (
        seed,
        is_unknown,
        is_unknown and ref.revision == "main",
        *others,
        not parse_checkpoint_name(ref.name).is_numbered,
        "" if ref.revision and is_unknown else ref.name,
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
