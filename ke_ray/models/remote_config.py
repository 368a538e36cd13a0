"""The configuration of a checkpoint that is not on this machine, without its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray.errors import CheckpointError
from ke_ray.models import hub
from ke_ray.models.layout import layout_of
from ke_ray.models.loading import config_from, load_config
from ke_ray.models.reference import CheckpointRef
from ke_ray.models.transfer import RetryPolicy, download, redact
from ke_ray.storage import exists, join, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["read_config"]

_NAMES = ("config.yaml", "config.json")
# A request should fail soon; the fetch of the checkpoint itself is patient.
_POLICY = RetryPolicy(attempts=2)


def read_config(ref: CheckpointRef) -> PreTrainedConfig:
    """The transformers configuration of any checkpoint; fetches its config file alone.

    Raises:
        CheckpointError: absent, malformed or out of reach.
        UnsupportedArchitectureError: ke_ray cannot score this architecture.
    """
    if ref.is_local:
        return load_config(ref)
    with tempfile.TemporaryDirectory(prefix="ke_ray-config-") as name:
        folder = Path(name)
        if ref.repo is not None:
            commit = ref.commit or ref.revision or "main"
            hub.download_files(ref.repo, commit, ["config.json"], folder, policy=_POLICY)
        elif not any(_fetch(ref, name, folder) for name in _NAMES):
            raise CheckpointError(
                f"'{redact(ref.location)}' has neither {' nor '.join(_NAMES)}; is it a checkpoint?"
            )
        present = [path.name for path in folder.iterdir() if path.is_file()]
        layout = layout_of(present)
        if layout is None:
            raise CheckpointError(f"'{ref.label}' has no readable configuration.")
        return config_from(folder, layout)


def _fetch(ref: CheckpointRef, name: str, folder: Path) -> bool:
    uri = join(ref.location, name)
    if uri.startswith(("http://", "https://")):
        return bool(download(uri, folder / name, policy=_POLICY))
    if not exists(uri):
        return False
    (folder / name).write_bytes(read_bytes(uri))
    return True
