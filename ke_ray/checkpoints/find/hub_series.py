"""The revisions of a Hub repository that make its series of checkpoints.

Without a glob the series is every revision whose name gives a step, and ``main`` after them where
its weights are not those of the last one (Amber's ``main`` follows ``ckpt_358``). Where no name
gives a step it is ``main`` alone. A note counts and names the revisions left out; a glob takes
them, with an unknown step.

Subfolders, commits and globs over repositories are in ``ke_ray.checkpoints.find.hub_places``.
"""

from __future__ import annotations

import glob
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
from ke_ray.checkpoints.reference import CheckpointRef, order_key
from ke_ray.errors import CheckpointSpecError


def list_hub(
    spec: str, endpoint: str | None, *, everything: bool, with_main: bool
) -> tuple[list[CheckpointRef], list[str]]:
    """The checkpoints of a repository, and notes about revisions that were left out.

    Args:
        spec: ``org/repo`` or ``org/repo@revision``, or one of ``hub_places``.
        everything: take every revision, because a glob is going to choose.
        with_main: whether ``main`` may join a series of steps.

    Raises:
        CheckpointSpecError: no such repository or revision, or it cannot be reached.
    """
    parts = parse_hub_spec(spec)
    repo, name = parts.repo, parts.revision
    if glob.has_magic(repo):
        refs = list_repositories(parts, endpoint)
        notes = [f"{len(refs)} repositories match; of each its revision 'main' is listed."]
        return refs, [] if name else notes
    if parts.subfolder:
        return list_subfolders(parts, endpoint), []
    if parts.title:
        return list_commits(parts, endpoint), []
    if name:
        return [_reference(repo, hub.find_revision(repo, name, endpoint=endpoint))], []
    refs = [_reference(repo, rev) for rev in hub.list_revisions(repo, endpoint=endpoint)]
    if everything:
        return refs, []
    stepped = sorted((ref for ref in refs if ref.step is not None), key=order_key)
    main = [ref for ref in refs if ref.revision == "main"]
    others = [ref.revision or "" for ref in refs if ref not in (*stepped, *main)]
    if not stepped:
        if not main:
            return refs, []
        notes = [
            f"None of the {len(others)} revisions beside 'main' has a name that gives a step "
            f"({few(others)}), so only 'main' is listed. To list others, with an unknown step, "
            "give a glob such as --revisions '*'."
        ]
        # A repository of one checkpoint may carry the step in its own name.
        parsed = parse_checkpoint_name(repo)
        main = [replace(main[0], step=parsed.step, pretraining_tokens=parsed.tokens)]
        return main, notes if others else []
    if main and with_main and _is_of_its_own(main[0], stepped[-1], endpoint):
        stepped += main
    notes = [
        f"{len(others)} revisions have names that give no step and are left out ({few(others)}). "
        "To list them, with an unknown step, give a glob such as --revisions '*'."
    ]
    return stepped, notes if others else []


def _reference(repo: str, revision: hub.HubRevision) -> CheckpointRef:
    return hub_reference(repo, revision, parse_checkpoint_name(revision.name), revision.name)


def _is_of_its_own(main: CheckpointRef, last: CheckpointRef, endpoint: str | None) -> bool:
    """Whether ``main`` has weights, and others than the last numbered checkpoint."""
    refs, *_ = _inspected([main, last], endpoint)
    if main.revision not in [ref.revision for ref in refs]:
        return False
    return len({ref.weights_fingerprint for ref in refs}) == len(refs)


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
        elif ref.step is not None or (details.layout and details.layout.weights):
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
