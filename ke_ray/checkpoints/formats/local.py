"""The layout of a checkpoint on this machine, which may be a folder or one file.

Beside the layouts that names alone tell (:mod:`ke_ray.checkpoints.formats.layout`):

=================================  =================================================================
``model_000500.pt`` (nanochat)     its configuration is ``meta_000500.json`` beside it
``*.ckpt`` (Lightning)             transformers' ``config.json`` beside it or one folder up
``.metadata`` and ``*.distcp``     DCP, in the folder itself (torchtitan) or inside it in
                                   ``model_and_optim`` (OLMo-core) or ``pytorch_model_fsdp_0``
                                   (accelerate); ``config.json`` in the folder or one folder up
a folder of weights alone          ``config.json`` one folder up
a state of ke_ray's pretraining    ``config.json`` of a checkpoint of the same run
=================================  =================================================================
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ke_ray.checkpoints.formats.dcp import METADATA
from ke_ray.checkpoints.formats.layout import Layout, layout_of
from ke_ray.checkpoints.formats.shards import SHARDS, STATE

_NANOCHAT = re.compile(r"model_([0-9]{1,15})\.pt")
_CONFIG = "config.json"
_OLMO_CORE = "model_and_optim"
_DCP = ("", _OLMO_CORE, "pytorch_model_fsdp_0")


def base_folder(path: Path) -> Path:
    """The folder in which the names of a checkpoint's layout lie."""
    return path.parent if path.is_file() else path


def nanochat_step(name: str) -> int | None:
    """The step in the name of a file of nanochat, or None."""
    match = _NANOCHAT.fullmatch(name)
    return int(match.group(1)) if match else None


def local_layout(path: Path) -> Layout | None:
    """The layout of a local folder or file, or None where it is no checkpoint."""
    if path.is_file():
        return _file_layout(path)
    if not path.is_dir():
        return None
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    layout = layout_of(names)
    if layout is None or not layout.weights:
        layout = _dcp_layout(path) or _state_layout(path) or layout
    if layout is None or layout.config != _CONFIG or _CONFIG in names:
        return layout
    return replace(layout, config=_config_above(path))


def is_whole(path: Path) -> bool:
    """Whether a local folder or file is a checkpoint with weights and a configuration."""
    layout = local_layout(path)
    return (
        layout is not None
        and bool(layout.weights)
        and (base_folder(path) / layout.config).is_file()
    )


def _file_layout(path: Path) -> Layout | None:
    if match := _NANOCHAT.fullmatch(path.name):
        return Layout("nanochat", f"meta_{match.group(1)}.json", (path.name,))
    if path.suffix == ".ckpt":
        beside = (path.parent / _CONFIG).is_file()
        return Layout("lightning", _CONFIG if beside else _config_above(path.parent), (path.name,))
    return None


def _dcp_layout(folder: Path) -> Layout | None:
    for name in _DCP:
        if (folder / name / METADATA).is_file():
            files = sorted(path.name for path in (folder / name).glob("*.distcp"))
            weights = [f"{name}/{file}".lstrip("/") for file in (METADATA, *files)]
            # OLMo-core's config.json is its own.
            config = _config_above(folder) if name == _OLMO_CORE else _CONFIG
            return Layout("dcp", config, tuple(weights))
    return None


def _state_layout(folder: Path) -> Layout | None:
    shards = sorted(path.name for path in folder.glob(SHARDS))
    if not shards or not (folder / STATE).is_file():
        return None
    return Layout("state", _CONFIG, (STATE, *shards))


def _config_above(folder: Path) -> str:
    """The configuration of a folder that has none: one folder up, or of the same run."""
    if (folder / STATE).is_file():
        saved = sorted(folder.absolute().parent.parent.glob(f"checkpoints/*/{_CONFIG}"))
        if saved:
            return str(saved[0])
    return f"../{_CONFIG}"
