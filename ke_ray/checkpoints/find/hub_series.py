"""The revisions of a Hub repository that make its series of checkpoints.

Without a glob the series is every revision whose name says how far training has come or names a
stage, and ``main`` after them where its weights are not those of the last one (Amber's ``main``
follows ``ckpt_358``). A note counts and names the revisions left out; a glob takes them, with an
unknown step, and a step pattern reads them. Where no name says anything (Marin's are animals),
every revision is taken, in the Hub's order, and a note says so.

Subfolders, commits and globs over repositories are in ``ke_ray.checkpoints.find.hub_places``.
"""

from __future__ import annotations

import glob
import re
from dataclasses import replace

from ke_ray.checkpoints import hub
from ke_ray.checkpoints.find.hub_places import (
    hub_reference,
    list_commits,
    list_repositories,
    list_subfolders,
    parse_hub_spec,
)
from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.checkpoints.find.series import few
from ke_ray.checkpoints.formats.foreign import explain_foreign
from ke_ray.checkpoints.reference import CheckpointRef, order_key, with_name
from ke_ray.errors import CheckpointSpecError


def list_hub(
    spec: str,
    endpoint: str | None,
    *,
    everything: bool,
    with_main: bool,
    pattern: re.Pattern[str] | None = None,
) -> tuple[list[CheckpointRef], list[str]]:
    """The checkpoints of a repository, and notes about revisions that were left out.

    Args:
        spec: ``org/repo`` or ``org/repo@revision``, or one of ``hub_places``.
        everything: take every revision, because a glob is going to choose.
        with_main: whether ``main`` may join a series of steps.
        pattern: reads names, see :func:`ke_ray.checkpoints.find.names.parse_checkpoint_name`.

    Raises:
        CheckpointSpecError: no such repository or revision, or it cannot be reached.
    """
    parts = parse_hub_spec(spec)
    repo, name = parts.repo, parts.revision
    if glob.has_magic(repo):
        refs = list_repositories(parts, endpoint, pattern)
        notes = [f"{len(refs)} repositories match; of each its revision 'main' is listed."]
        return refs, [] if name else notes
    if parts.subfolder:
        return list_subfolders(parts, endpoint, pattern), []
    if parts.title:
        return list_commits(parts, endpoint, pattern), []
    if name:
        revision = hub.find_revision(repo, name, endpoint=endpoint)
        return [_reference(repo, revision, pattern)], []
    refs = [_reference(repo, rev, pattern) for rev in hub.list_revisions(repo, endpoint=endpoint)]
    if everything:
        return refs, []
    return choose_series(refs, endpoint, with_main=with_main, pattern=pattern)


def choose_series(
    refs: list[CheckpointRef],
    endpoint: str | None,
    *,
    with_main: bool,
    pattern: re.Pattern[str] | None = None,
) -> tuple[list[CheckpointRef], list[str]]:
    """The revisions of one repository that make its series, and notes about the others.

    Args:
        refs: all of its revisions, in the Hub's order.
        endpoint: of the Hub.
        with_main: whether ``main`` may join the series.
        pattern: reads names.
    """
    main = [ref for ref in refs if ref.revision == "main"]
    others = [ref for ref in refs if ref.revision != "main"]
    if not others:
        # A repository of one checkpoint may carry the step in its own name.
        return [with_name(ref, parse_checkpoint_name(ref.repo or "", pattern)) for ref in main], []
    series = sorted((ref for ref in others if ref.is_numbered or ref.stage_label), key=order_key)
    if not any(ref.is_numbered for ref in series):
        series = sorted(others, key=order_key)
    if main and with_main and _is_of_its_own(main[0], series, endpoint):
        series += main
    left_out = [ref.revision or "" for ref in others if ref not in series]
    if not left_out:
        return series, []
    return series, [
        f"{len(left_out)} revisions have names that are not understood and are left out "
        f"({few(left_out)}). To list them, with an unknown step, give a glob such as "
        "--revisions '*'; --step-pattern reads a number from a name."
    ]


def _reference(
    repo: str, revision: hub.HubRevision, pattern: re.Pattern[str] | None
) -> CheckpointRef:
    parsed = parse_checkpoint_name(f"{repo}/{revision.name}", pattern)
    return hub_reference(repo, revision, parsed, revision.name)


def _is_of_its_own(main: CheckpointRef, series: list[CheckpointRef], endpoint: str | None) -> bool:
    """Whether ``main`` has weights, and others than the last checkpoint of each run.

    Without numbers, others than all: the Hub's order says nothing.
    """
    last = {(ref.seed, ref.branch): ref for ref in series if ref.is_numbered}
    refs, *_ = _inspected([main, *(last.values() or series)], endpoint)
    own = {ref.revision: ref.weights_fingerprint for ref in refs}
    return "main" in own and own.pop("main") not in own.values()


def inspect_hub(
    refs: list[CheckpointRef], endpoint: str | None
) -> tuple[list[CheckpointRef], list[str]]:
    """Sizes and hashes of Hub checkpoints, and the names of those without weights and step.

    Raises:
        CheckpointSpecError: none of them holds weights, or the Hub cannot be reached.
    """
    result, empty, files = _inspected(refs, endpoint)
    if not result:
        repos = ", ".join(sorted({ref.repo for ref in refs if ref.repo}))
        foreign = explain_foreign(files)
        raise CheckpointSpecError(
            f"None of the selected revisions of {repos} holds model weights"
            + (f": {foreign}" if foreign else ".")
        )
    return result, empty


def _inspected(
    refs: list[CheckpointRef], endpoint: str | None
) -> tuple[list[CheckpointRef], list[str], list[str]]:
    """The checkpoints, the revisions that hold none, and the files of all revisions."""
    # Subfolders were inspected when they were listed.
    asked = [ref for ref in refs if ref.repo and not (ref.subfolder and ref.size_bytes is not None)]
    revisions = hub.inspect_revisions(
        [
            (
                ref.repo or "",
                hub.HubRevision(ref.revision or "main", ref.commit or "", subfolder=ref.subfolder),
            )
            for ref in asked
        ],
        endpoint=endpoint,
    )
    inspected = dict(zip(asked, revisions, strict=True))
    result, empty = [], []
    for ref in refs:
        details = inspected.get(ref)
        if details is None:
            result.append(ref)
        elif ref.is_numbered or (details.layout and details.layout.weights):
            result.append(
                replace(
                    ref,
                    commit=details.commit,
                    size_bytes=details.size_bytes,
                    weights_fingerprint=details.weights_fingerprint,
                )
            )
        else:
            empty.append(ref.name)
    files = [file.name for revision in revisions for file in revision.files]
    return result, empty, files
