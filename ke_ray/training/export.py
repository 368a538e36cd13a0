"""Trained weights as a Hugging Face folder, tokenizer included, under any storage URI."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from torch import nn

from ke_ray import storage
from ke_ray.training.checkpoint import full_tensors
from ke_ray.training.parallel import Worker, barrier

__all__ = ["export_model"]


def export_model(
    model: nn.Module, uri: str, worker: Worker, tokenizer_folder: str | None = None
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files; whole or not at all.

    Call it on every worker (sharded weights are gathered); the main one writes. A folder that is
    there already is replaced.

    Args:
        model: a transformers model, sharded or not.
        uri: the folder to make.
        tokenizer_folder: URI whose ``tokenizer*.json`` are copied into it.
    """
    tensors = full_tensors(model)
    if worker.is_main:
        parent = storage.local_path(uri).absolute().parent if storage.is_local(uri) else None
        if parent is not None:
            storage.make_dirs(str(parent))
        temporary = tempfile.mkdtemp(dir=parent, prefix=".export-")
        try:
            _write(model, tensors, Path(temporary), tokenizer_folder)
            _publish(Path(temporary), uri)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    barrier(worker)


def _write(model: Any, tensors: dict[str, Any], folder: Path, tokenizer_folder: str | None) -> None:
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=tensors)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if tokenizer_folder is not None:
        for name in storage.list_dir(tokenizer_folder):
            if name.startswith(("tokenizer", "special_tokens")) and name.endswith(".json"):
                source = storage.join(tokenizer_folder, name)
                (folder / name).write_bytes(storage.read_bytes(source))


def _publish(folder: Path, uri: str) -> None:
    folder.chmod(0o755)
    storage.remove(uri)
    if storage.is_local(uri):
        folder.rename(storage.local_path(uri).absolute())
        return
    fs, path = fsspec.core.url_to_fs(uri)
    # config.json makes a folder a checkpoint, so it goes last.
    for file in sorted(folder.iterdir(), key=lambda f: f.name == "config.json"):
        fs.pipe_file(f"{path}/{file.name}", file.read_bytes())
