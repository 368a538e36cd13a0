"""Checkpoints in folders, here and in object stores, and at a URL.

A location is described by its name and by the files in it. A folder may be a checkpoint, hold
several, or both (the output of transformers' Trainer).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec

from ke_ray.checkpoints.find.csv_list import Row
from ke_ray.checkpoints.find.hub_places import one_on_hub, path_matches
from ke_ray.checkpoints.find.names import parse_checkpoint_name, stage_of
from ke_ray.checkpoints.find.series import read_small_json
from ke_ray.checkpoints.formats.foreign import explain_file, explain_foreign
from ke_ray.checkpoints.formats.layout import Layout, layout_of
from ke_ray.checkpoints.formats.local import base_folder, is_whole, local_layout, nanochat_step
from ke_ray.checkpoints.reference import CheckpointRef, with_name
from ke_ray.checkpoints.transfer import public_url
from ke_ray.errors import CheckpointSpecError
from ke_ray.storage import is_local, join, list_dir, local_path, slug
from ke_ray.storage.drivers import explain_driver_error

_MAX_FOLDERS = 5_000  # that ** may stand for
_MAX_EXAMINED = 20  # folders inside one, which may show why it holds no checkpoint


def from_location(
    location: str,
    row: Row | None = None,
    name: str | None = None,
    pattern: re.Pattern[str] | None = None,
) -> CheckpointRef:
    """A reference to one folder or URL, described by its name and its files."""
    last = name or shown(location).rstrip("/").rsplit("/", 1)[-1]
    if location.startswith("hf://"):
        ref = one_on_hub(location, pattern)
    else:
        ref = CheckpointRef(name=slug(last), location=location, format="native")
        ref = with_name(ref, parse_checkpoint_name(location, pattern))
    if row is not None:
        given = {
            column: value
            for column in ("step", "tokens", "seed", "branch")
            if (value := getattr(row, column)) is not None
        }
        ref = replace(ref, **given)
        if row.stage is not None:
            number, label = stage_of(row.stage)
            ref = replace(ref, stage=number, stage_label=label)
    if location.startswith(("hf://", "http://", "https://")):
        return ref
    names = _file_names(location)
    if ref.step is None and "trainer_state.json" in names:
        step = read_small_json(join(location, "trainer_state.json")).get("global_step")
        ref = replace(ref, step=step if type(step) is int and 0 <= step < 10**15 else None)
    if ref.step is None:
        ref = replace(ref, step=nanochat_step(last))
    layout = _layout(location)
    if layout is None:
        return ref
    size = None
    if is_local(location):
        folder = base_folder(local_path(location))
        sizes = [
            (folder / file).stat().st_size for file in layout.files if (folder / file).exists()
        ]
        size = sum(sizes)
    return replace(ref, format=layout.format, size_bytes=size)


def from_locations(locations: list[str]) -> list[CheckpointRef]:
    if not any(_is_whole(location) for location in locations):
        _refuse_foreign(locations[0])
    return [from_location(location) for location in locations]


def shown(location: str) -> str:
    """A location from which a name is made: a URL without user name, password and query."""
    return public_url(location) if location.startswith(("http://", "https://")) else location


def _file_names(location: str) -> list[str]:
    try:
        if is_local(location):
            folder = local_path(location)
            return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return list_dir(location)
    except OSError as error:
        raise CheckpointSpecError(f"Cannot list '{public_url(location)}': {error}.") from error


def _layout(location: str) -> Layout | None:
    if is_local(location):
        return local_layout(local_path(location))
    return layout_of(_file_names(location))


def _is_checkpoint(location: str) -> bool:
    if _layout(location) is None:
        return False
    # A folder with only half of the files is a broken checkpoint if its name says so.
    is_folder = not (is_local(location) and local_path(location).is_file())
    return _is_whole(location) or (is_folder and parse_checkpoint_name(location).is_numbered)


def _is_whole(location: str) -> bool:
    if is_local(location):
        return is_whole(local_path(location))
    names = _file_names(location)
    layout = layout_of(names)
    return layout is not None and bool(layout.weights) and layout.config in names


def _refuse_foreign(location: str) -> None:
    """Raise CheckpointSpecError for a folder in a format of another program."""
    is_file = is_local(location) and local_path(location).is_file()
    names = [local_path(location).name] if is_file else _file_names(location)
    foreign = None if _is_whole(location) else explain_foreign(names)
    if foreign is not None:
        raise CheckpointSpecError(
            f"'{shown(location)}' is no checkpoint that can be read: {foreign}"
        )


def from_folder(spec: str) -> list[CheckpointRef]:
    local = is_local(spec)
    base = str(local_path(spec)) if local else spec.rstrip("/")
    if local and Path(base).is_file():
        if _is_whole(base):
            return [from_location(base)]
        raise CheckpointSpecError(f"'{spec}' is a file; {explain_file(Path(base).name)}")
    if not local and glob.has_magic(base):
        return _from_remote_glob(base)
    names = _file_names(base)
    layout = _layout(base)
    if layout is not None:
        # A Trainer's output folder: final weights at the top, the series beside them.
        inside = [join(base, n) for n in names if _may_be_of_a_series(n)]
        refs = [from_location(location) for location in inside if _is_checkpoint(location)]
        if not refs:
            _refuse_foreign(base)
        if layout.weights or not refs:
            refs.append(from_location(base, name=Path(base).resolve().name if local else None))
        return refs
    for folder in (base, join(base, "checkpoints")):
        inside = [join(folder, name) for name in _file_names(folder) if not name.startswith(".")]
        checkpoints = [location for location in inside if _is_checkpoint(location)]
        if checkpoints:
            return from_locations(checkpoints)
        for location in [folder, *inside[:_MAX_EXAMINED]]:
            _refuse_foreign(location)
    raise CheckpointSpecError(
        f"'{spec if local else public_url(spec)}' holds no checkpoint: neither it nor a folder "
        "in it has config.json (or OLMo's config.yaml) and weights."
    )


def _may_be_of_a_series(name: str) -> bool:
    return parse_checkpoint_name(name).is_numbered or name.endswith(".ckpt")


def _glob(spec: str) -> Iterator[str]:
    """What a pattern matches; with ``**`` folders alone, through at most so many of them.

    ``glob`` follows links below ``**`` and has no end where one leads up again, as in ``/proc``.

    Raises:
        CheckpointSpecError: ``**`` stands for more folders than a series can lie in.
    """
    if "**" not in spec.split("/"):
        yield from glob.glob(spec)
        return
    parts = [part for part in spec.split("/") if part]
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first])
    root = f"/{root}" if spec.startswith("/") else root or "."
    magic = parts[first:]
    pairs = zip(magic, [*magic[1:], ""], strict=True)
    pattern = [part for part, after in pairs if not part == after == "**"]  # ** twice is ** once
    num_folders = 0
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        num_folders += len(names)
        if num_folders > _MAX_FOLDERS:
            raise CheckpointSpecError(
                f"'{spec}' looks through more than {_MAX_FOLDERS:,} folders; name the folder that "
                "holds the series in front of '**'."
            )
        below = os.path.relpath(folder, root).split(os.sep)
        if path_matches([] if below == ["."] else below, pattern):
            yield folder


def from_glob(spec: str) -> list[CheckpointRef]:
    folders = sorted({str(Path(path)) for path in _glob(spec)})
    checkpoints = [path for path in folders if _is_checkpoint(path)]
    if not checkpoints:
        for path in folders[:_MAX_EXAMINED]:
            _refuse_foreign(path)
        raise CheckpointSpecError(
            f"'{spec}' matches {len(folders)} paths, none of them a checkpoint folder; quote the "
            "glob and let it match the folders themselves."
        )
    return from_locations(checkpoints)


def _from_remote_glob(spec: str) -> list[CheckpointRef]:
    try:
        fs, path = fsspec.core.url_to_fs(spec)
        matches = [str(fs.unstrip_protocol(match)) for match in sorted(fs.glob(path))]
    except Exception as error:  # each driver has its own errors
        reason = explain_driver_error(error) or error
        raise CheckpointSpecError(f"Cannot list '{public_url(spec)}': {reason}.") from error
    checkpoints = [match for match in matches if _is_checkpoint(match)]
    if not checkpoints:
        raise CheckpointSpecError(f"'{public_url(spec)}' matches no checkpoint folder.")
    return from_locations(checkpoints)
