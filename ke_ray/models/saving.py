"""Writing of a model to a checkpoint folder, which appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec

from ke_ray.checkpoints.formats.layout import TOKENIZER_FILES
from ke_ray.checkpoints.formats.olmo import fuse
from ke_ray.checkpoints.formats.olmo_config import NativeConfig
from ke_ray.errors import StorageError
from ke_ray.models.loading import quiet, require_head
from ke_ray.storage import (
    exists,
    hold,
    is_local,
    join,
    list_dir,
    local_path,
    make_dirs,
    remove,
    remove_leftovers,
    temporary_path,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def save_model(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    layout: Literal["hf", "native"] = "hf",
    tokenizer: Any | None = None,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
    pieces: Iterable[dict[str, torch.Tensor]] | None = None,
) -> str:
    """Write a checkpoint that :func:`~ke_ray.models.loading.load_model` reads back exactly.

    Parameters keep their dtype. ``hf`` is ``config.json`` and ``model.safetensors``; ``native`` is
    OLMo's ``config.yaml`` and ``model.safetensors`` under OLMo's names, for OLMo models only.

    Args:
        model: on any device.
        folder: a path, or the URI of a folder (which is filled file by file, configuration last).
        layout: ``hf`` or ``native``.
        tokenizer: a ``tokenizers.Tokenizer``, a ``tokenizer.json``, or a folder that holds one.
        extra: further text files, by name.
        overwrite: replace what is there.
        pieces: under the ``hf`` layout, the weights by name in the place of the model's own; each
            piece becomes a file.

    Returns:
        ``folder``.

    Raises:
        UnsupportedArchitectureError: the native layout cannot hold this model.
        StorageError: the folder is not empty, or the disk is full or forbidden.
    """
    target = os.fspath(folder)
    if not overwrite and exists(target) and (not is_local(target) or _filled(local_path(target))):
        raise _exists(target)
    native = NativeConfig.from_transformers(model.config) if layout == "native" else None
    if native is not None:
        require_head(model, "OLMo's native layout")
    if not is_local(target):
        with tempfile.TemporaryDirectory(prefix="ke_ray-") as temporary:
            try:
                _fill(Path(temporary), model, native, tokenizer, extra or {}, pieces)
            except OSError as error:
                raise _cannot_write(temporary, error) from error
            _upload(Path(temporary), target)
        return target
    final = local_path(target).absolute()
    make_dirs(final.parent)
    # Its name begins with a dot, so that listings of checkpoint folders skip it.
    temporary_folder = temporary_path(final)
    remove_leftovers(final)
    lock = None
    try:
        temporary_folder.mkdir()
        lock = os.open(temporary_folder, os.O_RDONLY)
        hold(lock)
        _fill(temporary_folder, model, native, tokenizer, extra or {}, pieces)
        if overwrite:
            _replace(temporary_folder, final)
        else:
            temporary_folder.rename(final)  # refused where somebody has filled it meanwhile
    except OSError as error:
        if not overwrite and final.exists() and _filled(final):
            raise _exists(target) from error
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return target


def _fill(
    folder: Path,
    model: PreTrainedModel,
    native: NativeConfig | None,
    tokenizer: Any | None,
    extra: Mapping[str, str],
    pieces: Iterable[dict[str, torch.Tensor]] | None,
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        if native is None and pieces is not None:
            _save_pieces(folder, model, pieces)
        elif native is None:
            with quiet():
                model.save_pretrained(folder)
        else:
            fused = fuse(model.state_dict(), native)
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in fused.items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "config.yaml").write_text(native.to_yaml(), "utf-8")
    except SafetensorError as error:  # of a full disk, too
        raise OSError(str(error)) from error
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    for name, text in extra.items():
        write_atomic(folder / name, text)
    for path in folder.iterdir():
        # A rename can outlive the bytes in a power cut unless they are on the disk first.
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _save_pieces(
    folder: Path, model: PreTrainedModel, pieces: Iterable[dict[str, torch.Tensor]]
) -> None:
    """``save_pretrained``, of one piece after the other."""
    from safetensors import safe_open

    files: list[Path] = []
    num_bytes = 0
    for piece in pieces:
        num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in piece.values())
        with quiet():  # it gives the tensors the names and shapes that files have
            model.save_pretrained(folder, state_dict=piece, max_shard_size="1000TB")
        files.append((folder / "model.safetensors").rename(folder / f"piece{len(files)}"))
        piece.clear()  # before the next one is gathered
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files, 1):
        path = file.rename(folder / f"model-{i:05d}-of-{len(files):05d}.safetensors")
        with safe_open(path, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), path.name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if not isinstance(tokenizer, str | os.PathLike):
        tokenizer.save(str(folder / "tokenizer.json"))
        return
    source = local_path(tokenizer)
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
        return
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if "tokenizer.json" not in present:
        raise StorageError(
            f"'{source}' has no tokenizer.json; give the file, or a folder that contains it."
        )
    for name in present:
        shutil.copyfile(source / name, folder / name)


def _cannot_write(target: str, error: OSError) -> StorageError:
    return StorageError(
        f"Cannot write the checkpoint '{target}': {error.strerror or error}. Free some space or "
        "choose another folder."
    )


def _exists(target: str) -> StorageError:
    return StorageError(f"'{target}' already exists; choose another folder for the checkpoint.")


def _filled(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _replace(source: Path, final: Path) -> None:
    if not final.exists():
        source.rename(final)
        return
    old = temporary_path(final)
    final.rename(old)
    source.rename(final)
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def _upload(folder: Path, target: str) -> None:
    make_dirs(target)
    fs, path = fsspec.core.url_to_fs(target)
    names = sorted(entry.name for entry in folder.iterdir())
    for name in list_dir(target):
        if name not in names:  # leftovers of another layout would change what is loaded
            remove(join(target, name))
    for name in sorted(names, key=lambda name: name.startswith("config")):
        fs.put_file(str(folder / name), f"{path.rstrip('/')}/{name}")
