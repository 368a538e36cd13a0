"""The FFN and attention matrices of a checkpoint, straight from its files: no model is built."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ke_ray.checkpoints.formats.experts import plain_expert_name, unfused
from ke_ray.checkpoints.formats.local import base_folder
from ke_ray.checkpoints.formats.olmo import native_config, split
from ke_ray.checkpoints.formats.weights import open_weights, plain_names, read_layout
from ke_ray.checkpoints.reference import local_folder
from ke_ray.errors import CheckpointError
from ke_ray.models.architectures import check_config
from ke_ray.models.loading import load_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


class Matrix(NamedTuple):
    """Which matrix: its decoder layer, ``attention`` or ``ffn``, and its name within the layer."""

    layer: int
    part: str
    name: str


def weight_matrices(checkpoint: str | Path) -> dict[Matrix, torch.Tensor]:
    """The two-dimensional weights inside the decoder layers, as stored.

    Values are views of memory-mapped files wherever the format lets them be. Tensors that a model
    keeps fused (queries with keys and values; gate with up) are one matrix, except those of
    experts, which are taken one by one.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no such weight.
        UnsupportedArchitectureError: ke_ray does not know where its layers are.
    """
    folder = local_folder(checkpoint)
    entry = check_config(load_config(folder))
    layout = read_layout(folder)
    tensors: Mapping[str, torch.Tensor] = open_weights(folder, layout)
    if (native := native_config(base_folder(folder), layout)) is not None:
        tensors = split(tensors, native, origin=f"'{folder}'")
    plain = {name: plain_expert_name(short) for name, short in plain_names(tensors).items()}
    in_layer = re.compile(rf"(?:^|.*\.){re.escape(entry.layers)}\.(\d+)\.(.+)")
    matrices = {}
    for stored, name in plain.items():
        if in_layer.fullmatch(name) is None:
            continue
        for part, tensor in unfused(name, tensors[stored], plain.values()):
            match = in_layer.fullmatch(part)
            if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
                continue
            own = match[2].removesuffix(".weight")
            kind = "attention" if own.startswith(f"{entry.attention}.") else "ffn"
            matrices[Matrix(int(match[1]), kind, own)] = tensor
    if not matrices:
        raise CheckpointError(
            f"'{folder}' has no two-dimensional weight under '{entry.layers}.0.'; expected "
            "those of its feed-forward and attention parts."
        )
    return dict(sorted(matrices.items()))
