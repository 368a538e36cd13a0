"""Trained weights, gathered and exported as a Hugging Face folder with its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ke_ray import storage
from ke_ray.checkpoints.formats.layout import TOKENIZER_FILES
from ke_ray.models.saving import save_model
from ke_ray.training.checkpoint import full_tensors
from ke_ray.training.parallel import Worker, barrier


def whole_model(model: nn.Module, worker: Worker) -> Any | None:
    """A model that the main worker can run alone; None on the others.

    The model itself where it is not sharded; else a copy with all weights (a collective: call it
    on every worker).
    """
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model if worker.is_main else None
    tensors = full_tensors(model, worker)
    if not worker.is_main:
        return None
    with torch.random.fork_rng(devices=[]):  # its first weights draw random numbers
        copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    targets = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return copy.to(worker.device)


def export_model(
    model: nn.Module, uri: str, worker: Worker, tokenizer_folder: str | None = None
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files; whole or not at all.

    Call it on every worker (sharded weights are gathered); the main one writes. An existing
    folder is replaced.

    Args:
        model: a transformers model, sharded or not.
        uri: the folder to write.
        tokenizer_folder: URI of a folder whose tokenizer files are copied into it.
    """
    whole = whole_model(model, worker)
    if whole is not None:
        with _local(tokenizer_folder) as folder:
            save_model(whole, uri, tokenizer=folder, overwrite=True)
    barrier(worker)


@contextmanager
def _local(tokenizer_folder: str | None) -> Iterator[str | None]:
    if tokenizer_folder is None or storage.is_local(tokenizer_folder):
        yield tokenizer_folder
        return
    with tempfile.TemporaryDirectory(prefix="ke_ray-") as temporary:
        for name in set(storage.list_dir(tokenizer_folder)) & set(TOKENIZER_FILES):
            content = storage.read_bytes(storage.join(tokenizer_folder, name))
            Path(temporary, name).write_bytes(content)
        yield temporary
