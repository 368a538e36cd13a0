"""What a checkpoint SPEC names: from one folder to every revision of a repository.

=============================================  =====================================================
SPEC                                           checkpoints
=============================================  =====================================================
``runs/pretrain/checkpoints/step100``          one folder, in transformers' or OLMo's own layout
``runs/pretrain/checkpoints``                  every checkpoint folder inside it
``trainer_output``                             the ``checkpoint-N`` inside, and the final weights
                                               beside them at the step of ``trainer_state.json``
``"runs/*/step[0-9]*"``                        every checkpoint folder that the glob matches
``s3://bucket/run`` (any fsspec URI)           the same, elsewhere
``allenai/OLMo-1B-hf``, ``hf://org/repo@rev``  revisions of a Hugging Face repository, see
                                               ``ke_ray.checkpoints.find.hub_series``
``https://host/run/step1000-unsharded/``       a native checkpoint at a base URL
``OLMo-1B.csv``                                a list of step and folder or URL
=============================================  =====================================================

Then a glob on revision or name, a step range and every n-th narrow the selection, and
checkpoints with the same weight files are flagged. What a reader could take for something else
(several series or stages, names that were not understood) is said in notes.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from ke_ray.checkpoints.fetch.transfer import call_within, probe, redact
from ke_ray.checkpoints.find.csv_list import Row, read_csv_list
from ke_ray.checkpoints.find.duplicates import flag_duplicates
from ke_ray.checkpoints.find.hub_series import inspect_hub, list_hub
from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.checkpoints.find.series import few, listing_notes, read_small_json, with_series
from ke_ray.checkpoints.formats.foreign import explain_file, explain_foreign
from ke_ray.checkpoints.formats.layout import layout_of
from ke_ray.checkpoints.reference import CheckpointRef, order_key
from ke_ray.errors import CheckpointSpecError, StorageError, nearest
from ke_ray.storage import exists, is_local, join, list_dir, local_path, slug
from ke_ray.storage.drivers import explain_driver_error

__all__ = ["Listing", "find_checkpoints", "list_checkpoints"]

log = logging.getLogger(__name__)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STEPS = re.compile(r"\s*([0-9]{0,15})\s*(:?)\s*([0-9]{0,15})\s*")
_FIRST_ANSWER_S = 15.0
_LOOKED_INTO = 20  # folders that may say why a folder of them holds no checkpoint


@dataclass(frozen=True)
class Listing:
    """Checkpoints series by series in training order, and sentences about what is odd in them."""

    checkpoints: tuple[CheckpointRef, ...]
    notes: tuple[str, ...]


def list_checkpoints(
    spec: str,
    *,
    revisions: str | None = None,
    steps: str | None = None,
    every: int | None = None,
    limit: int | None = None,
    endpoint: str | None = None,
) -> list[CheckpointRef]:
    """The checkpoints of :func:`find_checkpoints`; its notes are logged as warnings."""
    listing = find_checkpoints(
        spec, revisions=revisions, steps=steps, every=every, limit=limit, endpoint=endpoint
    )
    for note in listing.notes:
        log.warning("%s: %s", redact(spec), note)
    return list(listing.checkpoints)


def find_checkpoints(
    spec: str,
    *,
    revisions: str | None = None,
    steps: str | None = None,
    every: int | None = None,
    limit: int | None = None,
    endpoint: str | None = None,
) -> Listing:
    """The checkpoints that ``spec`` names, in training order, with unique names.

    Args:
        spec: see the table above.
        revisions: glob that the revision (on the Hub) or the name must match.
        steps: range ``a:b``, both ends included; ``a:``, ``:b`` and ``a`` work too. Checkpoints
            without a step fall outside every range.
        every: keep every n-th of what is left, starting with the first.
        limit: keep at most so many, evenly spaced, the first and the last among them.
        endpoint: of the Hub; ``HF_ENDPOINT`` or huggingface.co by default.

    Raises:
        CheckpointSpecError: the spec is malformed, names nothing, or cannot be reached.
    """
    low, high = _step_range(steps)
    for option, value in (("every", every), ("limit", limit)):
        if value is not None and value < 1:
            raise CheckpointSpecError(f"{option}={value} was given, expected at least 1.")
    spec = spec.strip()
    notes: list[str] = []
    try:
        # A final checkpoint whose name gives no step lies outside every range of steps.
        found = _find(spec, revisions, endpoint, notes, with_main=steps is None)
        found = with_series(_unique_names(found))
    except StorageError as error:
        raise CheckpointSpecError(str(error)) from error
    chosen = [ref for ref in found if _matches(ref, revisions)]
    if not chosen:
        raise CheckpointSpecError(_no_match(spec, revisions, found))
    if steps is not None:
        chosen = [ref for ref in chosen if ref.step is not None and low <= ref.step <= high]
        if not chosen:
            known = sorted(ref.step for ref in found if ref.step is not None)
            span = f"steps {known[0]} to {known[-1]}" if known else "no step in any name"
            raise CheckpointSpecError(
                f"No checkpoint of '{spec}' lies in steps {steps}; it has {span}."
            )
    ordered = sorted(chosen, key=lambda ref: (ref.series or "", *order_key(ref)))
    chosen, empty = inspect_hub(_evenly(ordered[:: every or 1], limit), endpoint)
    if empty:
        notes.append(f"{len(empty)} revisions hold no weights and are left out ({few(empty)}).")
    chosen = flag_duplicates(chosen)
    return Listing(tuple(chosen), (*notes, *listing_notes(chosen)))


def _evenly(refs: list[CheckpointRef], limit: int | None) -> list[CheckpointRef]:
    if limit is None or len(refs) <= limit:
        return refs
    if limit == 1:
        return refs[:1]
    return [refs[round(i * (len(refs) - 1) / (limit - 1))] for i in range(limit)]


def _find(
    spec: str, revisions: str | None, endpoint: str | None, notes: list[str], *, with_main: bool
) -> list[CheckpointRef]:
    def from_hub(name: str) -> list[CheckpointRef]:
        refs, said = list_hub(name, endpoint, everything=revisions is not None, with_main=with_main)
        notes.extend(said)
        return refs

    if not spec or "\0" in spec:
        raise CheckpointSpecError("The checkpoint SPEC is empty; give a folder, a repo or a CSV.")
    if spec.startswith("hf://"):
        return from_hub(spec.removeprefix("hf://"))
    if spec.lower().endswith(".csv"):
        return [_from_location(row.location, row) for row in read_csv_list(spec)]
    if spec.startswith(("http://", "https://")):
        return _from_url(spec)
    if not is_local(spec) or exists(spec):
        return _from_folder(spec)
    if glob.has_magic(spec):
        return _from_glob(spec)
    repo = spec.partition("@")[0]
    if _REPO.fullmatch(repo):
        try:
            return from_hub(spec)
        except CheckpointSpecError as error:
            raise CheckpointSpecError(f"There is no folder '{spec}' here. {error}") from error
    raise CheckpointSpecError(
        f"There is no folder '{spec}'. Give a checkpoint folder, a folder of them, a glob, a Hub "
        "repository as org/name, a URL or a CSV list."
    )


def _from_location(location: str, row: Row | None = None, name: str | None = None) -> CheckpointRef:
    """A reference to one folder or URL, described by its name and by what lies in it."""
    said = parse_checkpoint_name(location)
    last = name or _shown(location).rstrip("/").rsplit("/", 1)[-1]
    ref = CheckpointRef(
        name=slug(last),
        location=location,
        format="native",
        step=said.step,
        pretraining_tokens=said.tokens,
        stage=said.stage,
        ingredient=said.ingredient,
    )
    if row is not None:
        ref = replace(
            ref,
            step=row.step if row.step is not None else ref.step,
            ingredient=row.ingredient if row.ingredient is not None else ref.ingredient,
        )
    if location.startswith("hf://"):
        repo, _, revision = location.removeprefix("hf://").partition("@")
        return replace(ref, location=f"hf://{repo}", format="hub", revision=revision or "main")
    if location.startswith(("http://", "https://")):
        return ref
    names = _file_names(location)
    if ref.step is None and "trainer_state.json" in names:
        step = read_small_json(join(location, "trainer_state.json")).get("global_step")
        ref = replace(ref, step=step if type(step) is int and 0 <= step < 10**15 else None)
    layout = layout_of(names)
    if layout is None:
        return ref
    size = None
    if is_local(location):
        folder = local_path(location)
        sizes = [
            (folder / file).stat().st_size for file in layout.files if (folder / file).exists()
        ]
        size = sum(sizes)
    return replace(ref, format=layout.format, size_bytes=size)


def _from_locations(locations: list[str]) -> list[CheckpointRef]:
    if not any(_is_whole(_file_names(location)) for location in locations):
        _refuse_foreign(locations[0])
    return [_from_location(location) for location in locations]


def _shown(location: str) -> str:
    """A location from which a name is made: a URL without user name, password and query."""
    return redact(location) if location.startswith(("http://", "https://")) else location


def _file_names(location: str) -> list[str]:
    try:
        if is_local(location):
            folder = local_path(location)
            return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return list_dir(location)
    except OSError as error:
        raise CheckpointSpecError(f"Cannot list '{redact(location)}': {error}.") from error


def _is_checkpoint(location: str) -> bool:
    names = _file_names(location)
    if layout_of(names) is None:
        return False
    # A folder with only half of the files is a broken checkpoint if its name says so.
    return _is_whole(names) or parse_checkpoint_name(location).step is not None


def _is_whole(names: list[str]) -> bool:
    layout = layout_of(names)
    return layout is not None and bool(layout.weights) and layout.config in names


def _refuse_foreign(location: str) -> None:
    """Raise CheckpointSpecError for a folder in a format of another program."""
    names = _file_names(location)
    foreign = None if _is_whole(names) else explain_foreign(names)
    if foreign is not None:
        raise CheckpointSpecError(
            f"'{_shown(location)}' is no checkpoint that can be read: {foreign}"
        )


def _from_folder(spec: str) -> list[CheckpointRef]:
    local = is_local(spec)
    base = str(local_path(spec)) if local else spec.rstrip("/")
    if local and Path(base).is_file():
        raise CheckpointSpecError(f"'{spec}' is a file; {explain_file(Path(base).name)}")
    if not local and glob.has_magic(base):
        return _from_remote_glob(base)
    names = _file_names(base)
    layout = layout_of(names)
    if layout is not None:
        _refuse_foreign(base)
        # A Trainer's output folder: final weights at the top, the series beside them.
        inside = [join(base, n) for n in names if parse_checkpoint_name(n).step is not None]
        refs = [_from_location(location) for location in inside if _is_checkpoint(location)]
        if layout.weights or not refs:
            refs.append(_from_location(base, name=Path(base).resolve().name if local else None))
        return refs
    for folder in (base, join(base, "checkpoints")):
        inside = [join(folder, name) for name in _file_names(folder) if not name.startswith(".")]
        checkpoints = [location for location in inside if _is_checkpoint(location)]
        if checkpoints:
            return _from_locations(checkpoints)
        for location in [folder, *inside[:_LOOKED_INTO]]:
            _refuse_foreign(location)
    raise CheckpointSpecError(
        f"'{redact(spec) if not local else spec}' holds no checkpoint: neither it nor a folder in "
        "it has config.json (or OLMo's config.yaml) and weights."
    )


def _from_glob(spec: str) -> list[CheckpointRef]:
    folders = sorted({str(Path(path)) for path in glob.glob(spec, recursive=True)})
    found = [path for path in folders if Path(path).is_dir() and _is_checkpoint(path)]
    if not found:
        for path in folders[:_LOOKED_INTO]:
            _refuse_foreign(path)
        raise CheckpointSpecError(
            f"'{spec}' matches {len(folders)} paths, none of them a checkpoint folder; quote the "
            "glob and let it match the folders themselves."
        )
    return _from_locations(found)


def _from_remote_glob(spec: str) -> list[CheckpointRef]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(spec)
        matches = [str(fs.unstrip_protocol(match)) for match in sorted(fs.glob(path))]
    except Exception as error:  # each driver has its own errors
        reason = explain_driver_error(error) or error
        raise CheckpointSpecError(f"Cannot list '{redact(spec)}': {reason}.") from error
    found = [match for match in matches if _is_checkpoint(match)]
    if not found:
        raise CheckpointSpecError(f"'{redact(spec)}' matches no checkpoint folder.")
    return _from_locations(found)


def _from_url(spec: str) -> list[CheckpointRef]:
    base = spec if spec.endswith("/") else f"{spec}/"
    try:
        there = call_within(
            _FIRST_ANSWER_S,
            lambda: probe(f"{base}config.yaml") or probe(f"{base}config.json"),
        )
    except (OSError, ValueError) as error:
        raise CheckpointSpecError(
            f"Cannot reach {redact(base)} ({type(error).__name__}: {error}). Check the address "
            "and the network."
        ) from error
    if there is None:
        raise CheckpointSpecError(
            f"{redact(base)} has neither config.yaml nor config.json; give the base URL of one "
            "checkpoint, or a CSV list of them."
        )
    return [_from_location(base)]


def _matches(ref: CheckpointRef, revisions: str | None) -> bool:
    last = ref.location.rstrip("/").rsplit("/", 1)[-1]
    return revisions is None or any(
        fnmatch.fnmatchcase(name, revisions) for name in (ref.revision or last, ref.name)
    )


def _no_match(spec: str, revisions: str | None, found: list[CheckpointRef]) -> str:
    names = [ref.revision or ref.name for ref in found]
    return (
        f"No revision of '{spec}' matches '{revisions}'; it has {len(names)}, "
        f"for example '{names[0]}'.{nearest(revisions or '', names)}"
        if names
        else f"'{spec}' lists no checkpoint."
    )


def _step_range(steps: str | None) -> tuple[int, float]:
    if steps is None:
        return 0, float("inf")
    found = _STEPS.fullmatch(steps)
    if not found or not (found.group(1) or found.group(3)):
        raise CheckpointSpecError(f"steps={steps!r} was given, expected a range such as 1000:5000.")
    low = int(found.group(1) or 0)
    if not found.group(2):
        return low, low
    high = int(found.group(3)) if found.group(3) else float("inf")
    if low > high:
        raise CheckpointSpecError(f"steps={steps!r} is empty: {low} lies above {high}.")
    return low, high


def _unique_names(refs: list[CheckpointRef]) -> list[CheckpointRef]:
    """Names that differ even where case does not count: parent folders, then numbers, help."""
    seen: set[str] = set()
    result = []
    clashes = Counter(ref.name.casefold() for ref in refs)
    for ref in refs:
        name = ref.name
        if clashes[name.casefold()] > 1:
            parts = [part for part in _shown(ref.location).rstrip("/").split("/") if part]
            name = slug("-".join([*parts[-2:-1], name]))
        number, base = 2, name
        while name.casefold() in seen:
            name = f"{base[:140]}-{number}"
            number += 1
        seen.add(name.casefold())
        result.append(replace(ref, name=name))
    return result
