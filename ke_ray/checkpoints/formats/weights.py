"""The tensors of a checkpoint folder, by name, without executing or copying anything.

safetensors files are memory-mapped: a tensor costs nothing until its bytes are used, and each
byte is read once. Pickled files (``model.pt``, ``pytorch_model.bin``) are read by
``torch.load(weights_only=True)``, which builds tensors and refuses every other object. Tensors of
training tools come under transformers' names.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.checkpoints.formats.dcp import METADATA, DcpFile
from ke_ray.checkpoints.formats.foreign import (
    explain_file,
    explain_foreign,
    explain_quantised,
    packed_name,
)
from ke_ray.checkpoints.formats.layout import Layout
from ke_ray.checkpoints.formats.local import base_folder, local_layout
from ke_ray.checkpoints.formats.pico import is_pico
from ke_ray.checkpoints.formats.shards import STATE, StateFile
from ke_ray.checkpoints.formats.tool_names import transformers_names
from ke_ray.errors import CheckpointError
from ke_ray.storage import parse_json

if TYPE_CHECKING:
    import torch

_BUFFER_ENDINGS = (
    # Constants that older versions of transformers stored: causal masks and rotary tables.
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
# Modules that wrap others; no model names one of its own so, and inner blocks are wrapped too.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."  # of DataParallel and its like, around the whole model
_INDEX_LIMIT = 64 * 2**20  # bytes; an index of 10,000 tensors has about one million


def is_buffer(name: str) -> bool:
    """Whether a stored tensor is a derived constant (mask, rotary table) and not a weight."""
    return name.endswith(_BUFFER_ENDINGS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors without the wrappers they were saved in, by stored name.

    ``torch.compile``, FSDP and activation checkpointing leave ``_orig_mod.`` and the like anywhere
    in a name; DistributedDataParallel and DeepSpeed put ``module.`` before all names.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith(_PARALLEL) for name in plain.values()):
        plain = {name: short.removeprefix(_PARALLEL) for name, short in plain.items()}
    return plain


def read_layout(folder: str | Path) -> Layout:
    """The layout of a local checkpoint folder that has a configuration and weights.

    Raises:
        CheckpointError: no such folder, or the configuration or the weights are missing.
    """
    path = Path(folder)
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint folder '{path}'.")
    layout = local_layout(path)
    has_config = layout is not None and (base_folder(path) / layout.config).is_file()
    if layout is not None and layout.weights and has_config:
        return layout
    if path.is_file():
        raise CheckpointError(f"'{path}' is a file; {explain_file(path.name)}")
    foreign = explain_foreign(entry.name for entry in path.iterdir())
    if foreign is not None:
        raise CheckpointError(f"'{path}' is no checkpoint that can be loaded: {foreign}")
    expected = (
        "config.json with model.safetensors (or shards, or pytorch_model.bin), or OLMo's own "
        "config.yaml with model.safetensors or model.pt"
    )
    if layout is None:
        raise CheckpointError(f"'{path}' is not a checkpoint; expected {expected}.")
    if not has_config:
        raise CheckpointError(f"'{path}' has no {Path(layout.config).name}; expected {expected}.")
    raise CheckpointError(f"'{path}' holds no weights; expected {expected}.")


class WeightFiles(Mapping[str, "torch.Tensor"]):
    """Tensor name to tensor over one or more open weight files.

    Values are views of memory-mapped files: read-only, and valid after :meth:`close` too.

    Attributes:
        renamed: whether the files store other names, with the prefixes of wrappers.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._handles: list[Any] = []
        stored: dict[str, Any] = {}
        indexed = _read_index(folder, layout)
        names = layout.weights if indexed is None else sorted(set(indexed.values()))
        for name in names[:1] if layout.format in ("dcp", "state") else names:
            opened = _open_file(folder / name)
            self._handles.append(opened)
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in stored:
                    raise CheckpointError(f"'{folder}' holds the tensor '{key}' twice.")
                stored[key] = opened
        if (packed := packed_name(stored)) is not None:
            raise CheckpointError(explain_quantised(f"'{folder}'", f"it holds '{packed}'"))
        if indexed is not None:
            absent = sorted(set(indexed) - set(stored))
            if absent:
                raise CheckpointError(
                    f"'{folder}': the index names {len(absent)} tensors that its files do not "
                    f"hold, the first '{absent[0]}'; fetch the checkpoint again."
                )
        self._source: dict[str, tuple[Any, str]] = {}
        plain, self._d_head = plain_names(stored), 0
        config = folder / layout.config
        if layout.format in ("nanochat", "lightning", "dcp") or is_pico(config):
            origin = f"'{folder / layout.weights[0]}'"
            renamed, self._interleaved = transformers_names(plain.values(), origin)
            plain = {key: renamed[short] for key, short in plain.items()}
            self._d_head = _head_width(config) if self._interleaved else 0
        for key, short in plain.items():
            if short in self._source:
                raise CheckpointError(
                    f"'{folder}' holds the tensor '{short}' twice, under '{key}' and "
                    f"'{self._source[short][1]}'."
                )
            self._source[short] = (stored[key], key)
        self.renamed = self._source.keys() != stored.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        source, stored = self._source[name]
        try:
            tensor = source[stored] if isinstance(source, dict) else source.get_tensor(stored)
        except Exception as error:
            raise CheckpointError(f"'{self._folder}': cannot read '{name}': {error}.") from error
        if self._d_head and name.endswith(self._interleaved):
            return _halves(tensor, self._d_head)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        source, stored = self._source[name]
        if isinstance(source, dict):
            return tuple(source[stored].shape)
        return tuple(source.get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Stored dtype of a tensor, from the header alone; None for one torch does not know."""
        source, stored = self._source[name]
        if isinstance(source, dict):
            return source[stored].dtype
        return safetensors_dtype(source.get_slice(stored).get_dtype())

    def num_elements(self) -> int:
        """Elements over all tensors."""
        total = 0
        for name in self:
            count = 1
            for size in self.shape(name):
                count *= size
            total += count
        return total


def open_weights(folder: str | Path, layout: Layout | None = None) -> WeightFiles:
    """Open the weight files of a local checkpoint folder.

    Raises:
        CheckpointError: a file is missing, truncated, malformed, or a pickle that holds anything
            but tensors (which is refused, never executed).
    """
    path = Path(folder)
    return WeightFiles(base_folder(path), layout or read_layout(path))


def safetensors_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors type name such as ``BF16``."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }.get(name)


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"The weight file '{path}' is missing; fetch the checkpoint again.")
    if path.name == METADATA:
        return DcpFile(path.parent)
    if path.name == STATE:
        return StateFile(path.parent)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    _check_header(path)
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:  # SafetensorError, OSError, and what a broken header may cause
        if os.strerror(errno.ENOMEM) in str(error):
            raise MemoryError(f"'{path}' cannot be mapped: {error}") from error
        raise CheckpointError(
            f"'{path}' is truncated or not a safetensors file: {error}. Fetch it again."
        ) from error


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"version ":  # and on: "https://git-lfs.github.com/spec/v1"
        raise CheckpointError(
            f"'{path}' is a Git LFS pointer, not the weights; run `git lfs pull` in its repository."
        )
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if length < 0 or length > size - 8:
        raise CheckpointError(
            f"'{path}' is truncated or not a safetensors file: its header would end at byte "
            f"{length + 8:,} of {size:,}. Fetch it again."
        )


def _open_pickle(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"'{path}' is a pickle that holds code or objects other than tensors. It was "
                f"refused and nothing of it was executed; {_ask_for(path)}."
            ) from error
        raise CheckpointError(f"'{path}' is truncated or not a weight file.") from error
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{path}' is truncated or not a weight file: {first}. Fetch it again."
        ) from error
    if path.suffix == ".ckpt" and isinstance(loaded, dict):
        loaded = loaded.get("state_dict")  # Lightning's
    if not isinstance(loaded, dict):
        raise CheckpointError(f"'{path}' holds a {type(loaded).__name__}, expected named tensors.")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"'{path}' holds a {type(value).__name__} under {name!r}, expected only tensors."
            )
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "tensor without values" if value.is_meta else "sparse or quantised tensor"
            raise CheckpointError(f"'{path}' holds a {kind} under {name!r}, expected plain ones.")
    return loaded


def _ask_for(path: Path) -> str:
    if path.suffix != ".ckpt":
        return "ask for a safetensors file"
    return (
        "its hyper_parameters are the usual cause: where you trust the file, save it again with "
        "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, FILE)"
    )


def _head_width(config: Path) -> int:
    """Width of an attention head in transformers' configuration of a Llama, or in Pico's."""
    try:
        values = parse_json(config.read_bytes())
        if is_pico(config):
            return int(values["d_model"] // values["attention_n_heads"])
        if values["model_type"] != "llama":
            raise ValueError(f"its model_type is {values['model_type']!r}")
        return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"'{config}' is not transformers' configuration of a Llama, the one model of which the "
            f"order of torchtitan's rows is known ({error})."
        ) from error


def _halves(rows: torch.Tensor, d_head: int) -> torch.Tensor:
    """Rows [heads · d_head, d_model] in Meta's order, pairs (2j, 2j + 1), as (j, j + d_head/2)."""
    return rows.view(-1, d_head // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _read_index(folder: Path, layout: Layout) -> dict[str, str] | None:
    if layout.index is None:
        return None
    path = folder / layout.index
    if not path.is_file():
        return None
    problem = f"'{path}' is not the index of a sharded checkpoint"
    if path.stat().st_size > _INDEX_LIMIT:
        raise CheckpointError(f"{problem}: it has more than {_INDEX_LIMIT:,} bytes.")
    try:
        weight_map = parse_json(path.read_bytes())["weight_map"]
        files = set(weight_map.values())
        plain = all(isinstance(name, str) and name == Path(name).name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{problem}: {error}.") from error
    if not files or not plain:
        raise CheckpointError(
            f"{problem}: its weight_map must name files inside the folder, got "
            f"{sorted(map(str, files))[:3]}."
        )
    suffix = Path(layout.index.removesuffix(".index.json")).suffix
    if any(Path(name).suffix != suffix for name in files):
        raise CheckpointError(f"{problem}: it mixes kinds of files, expected only '{suffix}'.")
    return weight_map
