"""The checkpoints that a SPEC names, from one folder to every revision of a repository.

=============================================  =====================================================
SPEC                                           checkpoints
=============================================  =====================================================
``runs/pretrain/checkpoints/step100``          one folder or file, in a layout of
                                               ``ke_ray.checkpoints.formats``
``runs/pretrain/checkpoints``                  every checkpoint folder inside it
``trainer_output``                             the ``checkpoint-N`` inside, and the final weights
                                               beside them at the step of ``trainer_state.json``
``"runs/*/step[0-9]*"``                        every checkpoint folder that the glob matches
``s3://bucket/run`` (any fsspec URI)           the same, elsewhere
``allenai/OLMo-1B-hf``, ``hf://org/repo@rev``  revisions of a Hugging Face repository, see
                                               ``ke_ray.checkpoints.find.hub_series``
``org/repo:sub/step*``, ``org/repo#title*``,   its subfolders, the commits with such titles, or
``org/name-*``                                 repositories, see ``find.hub_places``
``https://host/run/step1000-unsharded/``       a native checkpoint at a base URL
``OLMo-1B.csv``                                a list of step and folder, URL or Hub repository
=============================================  =====================================================

A glob on revision or name, a range of steps and every n-th narrow the selection, and checkpoints
with the same weight files are flagged. Notes name what a reader could misunderstand, such as
several series or stages, names that could not be parsed, and checkpoints that are missing in a
regular series.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections import Counter
from dataclasses import dataclass, replace

from ke_ray.checkpoints.find.csv_list import read_csv_list
from ke_ray.checkpoints.find.duplicates import flag_duplicates
from ke_ray.checkpoints.find.folder import from_folder, from_glob, from_location, shown
from ke_ray.checkpoints.find.hub_places import may_be_hub
from ke_ray.checkpoints.find.hub_series import inspect_hub, list_hub
from ke_ray.checkpoints.find.names import CheckpointName, with_pattern
from ke_ray.checkpoints.find.names import step_pattern as compile_pattern
from ke_ray.checkpoints.find.progress import missing_checkpoints, with_tokens
from ke_ray.checkpoints.find.series import few, listing_notes, with_series
from ke_ray.checkpoints.reference import CheckpointRef, order_key, position, with_name
from ke_ray.checkpoints.transfer import call_within, probe, public_url
from ke_ray.errors import CheckpointSpecError, StorageError, nearest
from ke_ray.storage import exists, is_local, slug

log = logging.getLogger(__name__)

_STEPS = re.compile(r"\s*([0-9]{0,15})\s*(:?)\s*([0-9]{0,15})\s*")
_FIRST_ANSWER_S = 15.0


@dataclass(frozen=True)
class Listing:
    """Checkpoints, series by series in training order, and notes about what is odd in them."""

    checkpoints: tuple[CheckpointRef, ...]
    notes: tuple[str, ...]


def list_checkpoints(
    spec: str,
    *,
    revisions: str | None = None,
    steps: str | None = None,
    every: int | None = None,
    limit: int | None = None,
    step_pattern: str | None = None,
    tokens_per_step: int | None = None,
    endpoint: str | None = None,
) -> list[CheckpointRef]:
    """The checkpoints of :func:`find_checkpoints`; its notes are logged as warnings."""
    listing = find_checkpoints(
        spec,
        revisions=revisions,
        steps=steps,
        every=every,
        limit=limit,
        step_pattern=step_pattern,
        tokens_per_step=tokens_per_step,
        endpoint=endpoint,
    )
    for note in listing.notes:
        log.warning("%s: %s", public_url(spec), note)
    return list(listing.checkpoints)


def find_checkpoints(
    spec: str,
    *,
    revisions: str | None = None,
    steps: str | None = None,
    every: int | None = None,
    limit: int | None = None,
    step_pattern: str | None = None,
    tokens_per_step: int | None = None,
    endpoint: str | None = None,
) -> Listing:
    """The checkpoints that ``spec`` names, in training order, with unique names.

    Args:
        spec: see the table above.
        revisions: glob that the revision (on the Hub) or the name must match.
        steps: range ``a:b``, both ends included; ``a:``, ``:b`` and ``a`` work too. Checkpoints
            without a step fall outside every range.
        every: keep every n-th of the remaining checkpoints, starting with the first.
        limit: keep at most this many of the remaining checkpoints, evenly spaced, including the
            first and the last.
        step_pattern: regular expression that reads names, see
            :func:`ke_ray.checkpoints.find.names.step_pattern`.
        tokens_per_step: batch size × sequence length, by which steps become tokens where no name
            counts tokens.
        endpoint: of the Hub; ``HF_ENDPOINT`` or huggingface.co by default.

    Raises:
        CheckpointSpecError: the spec is malformed, names nothing, or cannot be reached.
    """
    low, high = _step_range(steps)
    pattern = compile_pattern(step_pattern) if step_pattern is not None else None
    counts = {"every": every, "limit": limit, "tokens_per_step": tokens_per_step}
    for option, value in counts.items():
        if value is not None and value < 1:
            raise CheckpointSpecError(f"{option} is {value}; it must be at least 1.")
    spec = spec.strip()
    notes: list[str] = []
    try:
        # A final checkpoint whose name gives no step lies outside every range of steps.
        available = _find(spec, revisions, endpoint, notes, pattern, with_main=steps is None)
        if pattern is not None and not spec.lower().endswith(".csv"):  # whose columns come first
            available = [ref if ref.repo else _read(ref, pattern) for ref in available]
        available = with_series(_unique_names(available))
        available = with_tokens(available, tokens_per_step)
    except StorageError as error:
        raise CheckpointSpecError(str(error)) from error
    selection = [ref for ref in available if _matches(ref, revisions)]
    if not selection:
        raise CheckpointSpecError(_no_match(spec, revisions, available))
    if steps is not None:
        selection = [ref for ref in selection if ref.step is not None and low <= ref.step <= high]
        if not selection:
            numbers = sorted(ref.step for ref in available if ref.step is not None)
            span = f"steps {numbers[0]} to {numbers[-1]}" if numbers else "no step in any name"
            raise CheckpointSpecError(
                f"No checkpoint of '{spec}' lies in steps {steps}; it has {span}."
            )
    ordered = sorted(selection, key=lambda ref: (ref.series or "", *order_key(ref)))
    notes += missing_checkpoints(ordered)
    selection, empty = inspect_hub(_evenly(ordered[:: every or 1], limit), endpoint)
    if empty:
        notes.append(f"{len(empty)} revisions hold no weights and are left out ({few(empty)}).")
    selection = flag_duplicates(selection)
    return Listing(tuple(selection), (*notes, *listing_notes(selection)))


def _read(ref: CheckpointRef, pattern: re.Pattern[str]) -> CheckpointRef:
    """A folder at the position that a step pattern finds in its name; else as it was."""
    name = ref.location.rstrip("/").rsplit("/", 1)[-1]
    return with_name(ref, with_pattern(CheckpointName(**position(ref)), pattern, name))


def _evenly(refs: list[CheckpointRef], limit: int | None) -> list[CheckpointRef]:
    if limit is None or len(refs) <= limit:
        return refs
    if limit == 1:
        return refs[:1]
    return [refs[round(i * (len(refs) - 1) / (limit - 1))] for i in range(limit)]


def _find(
    spec: str,
    revisions: str | None,
    endpoint: str | None,
    notes: list[str],
    pattern: re.Pattern[str] | None,
    *,
    with_main: bool,
) -> list[CheckpointRef]:
    def from_hub(name: str) -> list[CheckpointRef]:
        refs, hub_notes = list_hub(
            name,
            endpoint,
            everything=revisions is not None,
            with_main=with_main,
            pattern=pattern,
        )
        notes.extend(hub_notes)
        return refs

    if not spec or "\0" in spec:
        raise CheckpointSpecError("The checkpoint SPEC is empty; give a folder, a repo or a CSV.")
    if spec.startswith("hf://"):
        return from_hub(spec.removeprefix("hf://"))
    if spec.lower().endswith(".csv"):
        return [from_location(row.location, row, pattern=pattern) for row in read_csv_list(spec)]
    if spec.startswith(("http://", "https://")):
        return _from_url(spec)
    if not is_local(spec) or exists(spec):
        return from_folder(spec)
    is_hub = may_be_hub(spec)
    if glob.has_magic(spec) and (not is_hub or exists(spec.partition("/")[0])):
        return from_glob(spec)
    if is_hub:
        try:
            return from_hub(spec)
        except CheckpointSpecError as error:
            raise CheckpointSpecError(f"There is no folder '{spec}' here. {error}") from error
    raise CheckpointSpecError(
        f"There is no folder '{spec}'. Give a checkpoint folder, a folder of them, a glob, a Hub "
        "repository as org/name, a URL or a CSV list."
    )


def _from_url(spec: str) -> list[CheckpointRef]:
    base = spec if spec.endswith("/") else f"{spec}/"
    try:
        file = call_within(
            _FIRST_ANSWER_S,
            lambda: probe(f"{base}config.yaml") or probe(f"{base}config.json"),
        )
    except (OSError, ValueError) as error:
        raise CheckpointSpecError(
            f"Cannot reach {public_url(base)} ({type(error).__name__}: {error}). Check the address "
            "and the network."
        ) from error
    if file is None:
        raise CheckpointSpecError(
            f"{public_url(base)} has neither config.yaml nor config.json; give the base URL of one "
            "checkpoint, or a CSV list of them."
        )
    return [from_location(base)]


def _matches(ref: CheckpointRef, revisions: str | None) -> bool:
    last = ref.location.rstrip("/").rsplit("/", 1)[-1]
    return revisions is None or any(
        fnmatch.fnmatchcase(name, revisions) for name in (ref.revision or last, ref.name)
    )


def _no_match(spec: str, revisions: str | None, available: list[CheckpointRef]) -> str:
    names = [ref.name for ref in available]
    return (
        f"No revision of '{spec}' matches '{revisions}'; it has {len(names)}, "
        f"for example '{names[0]}'.{nearest(revisions or '', names)}"
        if names
        else f"'{spec}' lists no checkpoint."
    )


def _step_range(steps: str | None) -> tuple[int, float]:
    if steps is None:
        return 0, float("inf")
    match = _STEPS.fullmatch(steps)
    if not match or not (match.group(1) or match.group(3)):
        raise CheckpointSpecError(f"steps is {steps!r}; expected a range such as 1000:5000.")
    low = int(match.group(1) or 0)
    if not match.group(2):
        return low, low
    high = int(match.group(3)) if match.group(3) else float("inf")
    if low > high:
        raise CheckpointSpecError(f"steps {steps!r} is an empty range: {low} is above {high}.")
    return low, high


def _unique_names(refs: list[CheckpointRef]) -> list[CheckpointRef]:
    """Names that differ even where case does not count: parent folders, then numbers, help."""
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    result = []
    clashes = Counter(ref.name.casefold() for ref in refs)
    for ref in refs:
        name = ref.name
        if clashes[name.casefold()] > 1:
            parts = [part for part in shown(ref.location).rstrip("/").split("/") if part]
            name = slug("-".join([*parts[-2:-1], name]))
        base = name[:140]
        while name.casefold() in seen:
            numbers[base] += 1
            name = f"{base}-{numbers[base] + 1}"
        seen.add(name.casefold())
        result.append(replace(ref, name=name))
    return result
