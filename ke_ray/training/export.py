"""Trained weights as a Hugging Face folder with its tokenizer, written piece by piece."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ke_ray import storage
from ke_ray.checkpoints.formats.layout import TOKENIZER_FILES
from ke_ray.models.saving import save_model
from ke_ray.training.parallel import Worker, barrier, full_tensor, named_tensors

#: Bytes, at least, of every weight file but the last: what a worker has to hold.
FILE_BYTES = 2 * 2**30


def export_model(
    model: nn.Module, uri: str, worker: Worker, tokenizer_folder: str | None = None
) -> None:
    """Write ``config.json``, the weights and the tokenizer's files; whole or not at all.

    Call it on every worker (sharded weights are gathered); the main one writes. An existing
    folder is replaced.

    Args:
        model: a transformers model, sharded or not.
        uri: the folder to write.
        tokenizer_folder: URI of a folder whose tokenizer files are copied into it.
    """
    if worker.is_main:
        with _local(tokenizer_folder) as folder:
            pieces = weight_pieces(model)
            save_model(model, uri, tokenizer=folder, overwrite=True, pieces=pieces)
    else:
        for tensor in named_tensors(model).values():
            if isinstance(tensor, DTensor):
                tensor.full_tensor()  # for the main worker
    barrier(worker)


def weight_pieces(
    model: nn.Module, max_bytes: int = FILE_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """The whole weights on the CPU, a few layers at a time; a collective of a sharded model.

    Layers stay in one piece: the names and shapes of some files come from several tensors.
    """
    piece: dict[str, torch.Tensor] = {}
    num_bytes, layer = 0, ""
    for name, tensor in named_tensors(model).items():
        found = re.match(r".*?\.\d+\.", name)
        own_layer = found[0] if found else name
        if own_layer != layer and num_bytes >= max_bytes:
            yield piece
            piece, num_bytes = {}, 0
        layer = own_layer
        piece[name] = full_tensor(tensor).contiguous()
        num_bytes += tensor.numel() * tensor.element_size()
    yield piece


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
