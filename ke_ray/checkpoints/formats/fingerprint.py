"""The canonical hash of a checkpoint's weights.

    weights_sha256 = sha256 over the tensors sorted by name of
                     name ‖ 0 ‖ "d0,d1,…" ‖ 0 ‖ sha256(values as little-endian float32) ‖ 10

It is a property of the function the weights define, not of the files:

* OLMo's native layout is hashed under transformers' names, fused tensors by their rows;
* experts are hashed one by one, as most files store them, also where they are fused (``experts``);
* sharding, file format and order do not enter;
* the prefix of the base model (``model.``, ``transformer.``, ``gpt_neox.``) is left out, because
  bare and headed models store the same tensors with and without it; so are the prefixes of
  wrappers (``module.``, ``_orig_mod.``; see ``weights.plain_names``);
* an output head equal to the input embedding is left out (tied weights may be stored or not);
* constants that old versions stored (causal masks, rotary tables) are left out;
* bf16 and f16 files are hashed by their exact float32 values.

Tensors are streamed in pieces of a few MiB: memory does not grow with the model. One core with SHA
instructions hashed 1.7 GB/s of float32 and 0.8 GB/s of stored bf16 (measured), so an OLMo-1B
checkpoint (4.7 GB) costs about 3 s of one core. Hashing and conversion release the interpreter
lock: it runs in a thread beside scoring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray.checkpoints.formats.experts import plain_expert_name, unfused
from ke_ray.checkpoints.formats.local import base_folder
from ke_ray.checkpoints.formats.olmo import native_config, split
from ke_ray.checkpoints.formats.weights import is_buffer, open_weights, plain_names, read_layout
from ke_ray.checkpoints.reference import CheckpointRef, local_folder
from ke_ray.errors import CheckpointError, KeRayError

if TYPE_CHECKING:
    import torch

_PIECE = 2**20  # elements hashed at a time
_PREFIXES = ("model.", "transformer.", "gpt_neox.")
_HEAD = "lm_head.weight"  # stored as embed_out.weight by GPT-NeoX
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


class HashingStoppedError(KeRayError):
    """``should_stop`` ended it; there is no hash."""


def weights_sha256(
    checkpoint: CheckpointRef | str | Path, *, should_stop: Callable[[], bool] | None = None
) -> str:
    """The canonical hash of a local checkpoint, in either layout, as 64 hexadecimal digits.

    Args:
        checkpoint: a local folder.
        should_stop: called between pieces, so that a scan that ends early need not wait.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        HashingStoppedError: ``should_stop`` returned True.
    """
    folder = local_folder(checkpoint)
    layout = read_layout(folder)
    tensors: Mapping[str, torch.Tensor] = open_weights(folder, layout)
    if (native := native_config(base_folder(folder), layout)) is not None:
        tensors = split(tensors, native, origin=f"'{folder}'")
    return tensors_sha256(tensors, should_stop=should_stop)


def tensors_sha256(
    tensors: Mapping[str, torch.Tensor], *, should_stop: Callable[[], bool] | None = None
) -> str:
    """The canonical hash of named tensors in memory (a ``state_dict``), as above.

    Raises:
        CheckpointError: two tensors have the same canonical name.
        HashingStoppedError: ``should_stop`` returned True.
    """
    digests: dict[str, tuple[str, bytes]] = {}
    names = {
        name: plain_expert_name(_canonical(plain))
        for name, plain in plain_names(tensors).items()
        if not is_buffer(plain)
    }
    for name, canonical in names.items():
        for part, tensor in unfused(canonical, tensors[name], names.values()):
            if part in digests:
                raise CheckpointError(f"Two tensors are both called '{part}'; which one counts?")
            shape = ",".join(str(size) for size in tensor.shape)
            digests[part] = (shape, _digest(tensor, should_stop))
    if any(digests.get(_HEAD) == digests.get(name, ()) for name in _EMBEDDINGS):
        del digests[_HEAD]
    total = hashlib.sha256()
    for name, (shape, digest) in sorted(digests.items()):
        total.update(f"{name}\0{shape}\0".encode() + digest + b"\n")
    return total.hexdigest()


def _canonical(name: str) -> str:
    if name == "embed_out.weight":
        return _HEAD
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _digest(tensor: torch.Tensor, should_stop: Callable[[], bool] | None) -> bytes:
    import torch

    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)  # a view: stored tensors and their rows are contiguous
    for start in range(0, flat.numel(), _PIECE):
        if should_stop is not None and should_stop():
            raise HashingStoppedError("Hashing was stopped before it was done.")
        values = flat[start : start + _PIECE].to(device="cpu", dtype=torch.float32).numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.digest()
