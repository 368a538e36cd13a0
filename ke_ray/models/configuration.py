"""The configuration of a checkpoint that is not on this machine, without its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ke_ray.checkpoints import hub
from ke_ray.checkpoints.fetch.checkpoint import MAX_TEXT_BYTES
from ke_ray.checkpoints.formats.layout import Layout, layout_of
from ke_ray.checkpoints.formats.weights import read_layout
from ke_ray.checkpoints.reference import CheckpointRef, local_folder
from ke_ray.checkpoints.retries import RetryPolicy
from ke_ray.checkpoints.transfer import download, public_url
from ke_ray.errors import CheckpointError
from ke_ray.models.architectures import check_config
from ke_ray.models.loading import config_from
from ke_ray.storage import exists, join, parse_json, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAMES = ("config.yaml", "config.json")
# A request should fail soon; the fetch of the checkpoint itself is patient.
_POLICY = RetryPolicy(attempts=2)


#: What the set-up of a scan needs of a configuration.
_OUTLINE = ("model_type", "vocab_size", "max_position_embeddings", "eos_token_id")
# Let config_from refuse these.
_QUANTISED = {"quantization_config", "quantization", "compression_config"}


def read_config(ref: CheckpointRef) -> PreTrainedConfig:
    """The transformers configuration of any checkpoint; fetches its config file alone.

    Raises:
        CheckpointError: absent, malformed or out of reach.
        UnsupportedArchitectureError: ke_ray cannot score this architecture.
    """
    with _config_folder(ref) as (folder, layout):
        return config_from(folder, layout)


def read_any_config(ref: CheckpointRef) -> PreTrainedConfig:
    """As ``read_config``, also of an architecture that ke_ray does not know.

    Raises:
        CheckpointError: absent, malformed or out of reach.
    """
    with _config_folder(ref) as (folder, layout):
        return config_from(folder, layout, must_be_known=False)


def read_outline(ref: CheckpointRef) -> Any:
    """Model type, vocabulary, positions and end-of-text id (`_OUTLINE`) of any checkpoint.

    Where the file states all of them, transformers, which takes two seconds to import, is not
    needed for its defaults and other names.

    Raises:
        CheckpointError, UnsupportedArchitectureError: as ``read_config``.
    """
    with _config_folder(ref) as (folder, layout):
        values = _plain_values(folder / layout.config) if layout.format == "hf" else {}
        if not all(name in values for name in _OUTLINE) or _QUANTISED & values.keys():
            return config_from(folder, layout)
    outline = SimpleNamespace(**values)
    check_config(outline)
    return outline


def _plain_values(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}  # transformers' reader says what is wrong
    if not isinstance(values, dict):
        return {}
    sizes = (values.get(name) for name in ("vocab_size", "max_position_embeddings"))
    eos = values.get("eos_token_id")
    is_plain = all(type(size) is int and size > 0 for size in sizes)
    return values if is_plain and (eos is None or type(eos) is int) else {}


@contextmanager
def _config_folder(ref: CheckpointRef) -> Iterator[tuple[Path, Layout]]:
    """A local folder that holds the configuration of a checkpoint, and its layout."""
    if ref.is_local:
        folder = local_folder(ref)
        yield folder, read_layout(folder)
        return
    with tempfile.TemporaryDirectory(prefix="ke_ray-config-") as name:
        folder = Path(name)
        if ref.repo is not None:
            commit = ref.commit or ref.revision or "main"
            path = f"{ref.subfolder}/config.json".lstrip("/")
            hub.download_file(
                *(ref.repo, commit, path, folder / "config.json"),
                policy=_POLICY,
                max_bytes=MAX_TEXT_BYTES,
            )
        elif not any(_fetch(ref, name, folder) for name in _NAMES):
            raise CheckpointError(
                f"'{public_url(ref.location)}' has neither {' nor '.join(_NAMES)}; "
                "is it a checkpoint?"
            )
        present = [path.name for path in folder.iterdir() if path.is_file()]
        layout = layout_of(present)
        if layout is None:
            raise CheckpointError(f"'{ref.label}' has no readable configuration.")
        yield folder, layout


def _fetch(ref: CheckpointRef, name: str, folder: Path) -> bool:
    uri = join(ref.location, name)
    if uri.startswith(("http://", "https://")):
        return bool(download(uri, folder / name, policy=_POLICY, max_bytes=MAX_TEXT_BYTES))
    if not exists(uri):
        return False
    (folder / name).write_bytes(read_bytes(uri, MAX_TEXT_BYTES))
    return True
