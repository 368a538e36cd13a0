"""Checkpoints on the Hub that are not revisions: subfolders, commits of a branch, repositories.

=========================================  =========================================================
SPEC                                       checkpoints
=========================================  =========================================================
``org/name[@revision]:sub/step*``          the subfolders of one revision that the glob matches
``org/name[@revision]:sub``                that subfolder, or the checkpoint folders inside it
``org/name[@branch]#*step *``              the commits of a branch whose title the glob matches
``org/name-*[@revision]``                  the repositories of an organisation that the glob matches
=========================================  =========================================================

The revision is ``main`` where none is given. Step, tokens and stage come from the subfolder's path,
the commit's title or the repository's name.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ke_ray.checkpoints import hub
from ke_ray.checkpoints.find.names import CheckpointName, parse_checkpoint_name
from ke_ray.checkpoints.find.series import few
from ke_ray.checkpoints.formats.foreign import explain_foreign
from ke_ray.checkpoints.hub_api import endpoint_url
from ke_ray.checkpoints.reference import CheckpointRef, with_name
from ke_ray.errors import CheckpointSpecError, nearest
from ke_ray.storage import slug

_SPEC = re.compile(r"([^@:#]+)(?:@([^:#]+))?(?::([^#]+)|#(.+))?")
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
# As _REPO with an owner, whose name alone may be a glob: what a SPEC without hf:// may mean.
_OWNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9*?\[][\w.*?\[\]!-]*")


@dataclass(frozen=True)
class HubSpec:
    """The parts of a SPEC on the Hub; empty where it lacks them."""

    repo: str
    revision: str
    subfolder: str
    title: str


def parse_hub_spec(spec: str) -> HubSpec:
    """The parts of ``org/name[@revision][:subfolder]`` or ``org/name[@branch]#title``.

    Raises:
        CheckpointSpecError: it is neither.
    """
    match = _SPEC.fullmatch(spec.strip("/"))
    repo, revision, subfolder, title = (g or "" for g in match.groups()) if match else ("",) * 4
    folders = [part for part in subfolder.split("/") if part]
    is_repo = _REPO.fullmatch(repo) or _OWNED.fullmatch(repo)
    if not is_repo or ".." in repo or ".." in folders:
        raise CheckpointSpecError(
            f"'{spec}' is not a Hub repository; expected org/name, with @revision, :subfolder or "
            "#title of commits after it, or a glob such as 'org/name-*'."
        )
    parts = HubSpec(repo, revision, "/".join(folders), title)
    if glob.has_magic(parts.repo) and (parts.subfolder or parts.title):
        raise CheckpointSpecError(
            f"'{spec}' is a glob over repositories and names a subfolder or commits in them; give "
            "one repository, or list the checkpoints in a CSV file as hf://org/name:subfolder."
        )
    return parts


def may_be_hub(spec: str) -> bool:
    """Whether a SPEC without ``hf://`` that is no folder has the form of one on the Hub."""
    return _OWNED.fullmatch(re.split("[@:#]", spec, maxsplit=1)[0]) is not None


def hub_reference(
    repo: str, revision: hub.HubRevision, parsed: CheckpointName, name: str
) -> CheckpointRef:
    """A reference to a revision, or to the subfolder of it that ``revision`` names."""
    ref = CheckpointRef(
        name=slug(name),
        location=f"hf://{repo}" + (f":{revision.subfolder}" if revision.subfolder else ""),
        format="hub",
        revision=revision.name,
        commit=revision.commit or None,
    )
    return with_name(ref, parsed)


def one_on_hub(location: str, pattern: re.Pattern[str] | None = None) -> CheckpointRef:
    """A reference to ``hf://org/name[@revision][:subfolder]``, without asking the Hub.

    Raises:
        CheckpointSpecError: it has another form, or is one that names several checkpoints.
    """
    spec = parse_hub_spec(location.removeprefix("hf://"))
    if glob.has_magic(spec.repo + spec.subfolder) or spec.title:
        raise CheckpointSpecError(
            f"'{location}' may name several checkpoints; a row of a list names one, as "
            "hf://org/name, with @revision and :subfolder after it where needed."
        )
    revision = hub.HubRevision(spec.revision or "main", "", subfolder=spec.subfolder)
    if spec.subfolder:
        return _subfolder_reference(spec.repo, revision, pattern)
    name = location.rstrip("/").rpartition("/")[2]
    # A repository of one checkpoint carries the step in its own name, one of several in revisions.
    source = spec.repo if revision.name == "main" else f"{spec.repo}/{revision.name}"
    return hub_reference(spec.repo, revision, parse_checkpoint_name(source, pattern), name)


def list_subfolders(
    spec: HubSpec, endpoint: str | None, pattern: re.Pattern[str] | None = None
) -> list[CheckpointRef]:
    """The checkpoints in the subfolders of one revision, with sizes and hashes.

    Raises:
        CheckpointSpecError: no subfolder matches, or none of those that do holds a checkpoint.
    """
    at = hub.find_revision(spec.repo, spec.revision or "main", endpoint=endpoint)
    folders = {f.subfolder: f for f in hub.inspect_folders(spec.repo, at, endpoint=endpoint)}
    wanted = [part for part in spec.subfolder.split("/") if part]
    matching = _below(folders, wanted)
    if not glob.has_magic(spec.subfolder) and not any(_is_whole(f) for f in matching):
        matching += _below(folders, [*wanted, "*"])
    refs = [
        replace(
            _subfolder_reference(spec.repo, folder, pattern),
            size_bytes=folder.size_bytes,
            weights_fingerprint=folder.weights_fingerprint,
        )
        for folder in matching
        # A folder with only half of the files is a broken checkpoint if its name says so.
        if _is_whole(folder)
        or (folder.layout and _parse_path(folder.subfolder, pattern).is_numbered)
    ]
    if refs:
        return refs
    described = f"'{spec.repo}' at '{at.name}'"
    if not matching:
        names = list(folders)
        raise CheckpointSpecError(
            f"{described} has no folder with files that matches '{spec.subfolder}'; it has "
            f"{few(names) if names else 'none'}.{nearest(spec.subfolder, names)}"
        )
    foreign = explain_foreign(file.name for folder in matching for file in folder.files)
    raise CheckpointSpecError(
        f"{described}: none of the {len(matching)} folders that match '{spec.subfolder}' holds a "
        f"configuration and model weights{f': {foreign}' if foreign else '.'}"
    )


def list_commits(
    spec: HubSpec, endpoint: str | None, pattern: re.Pattern[str] | None = None
) -> list[CheckpointRef]:
    """The commits of a branch whose title matches, oldest first.

    Raises:
        CheckpointSpecError: none matches.
    """
    branch = spec.revision or "main"
    commits = hub.list_commits(spec.repo, branch, endpoint=endpoint)
    refs = [
        hub_reference(
            spec.repo, hub.HubRevision(commit, commit), _parse_title(title, pattern), title
        )
        for commit, title in reversed(commits)
        if fnmatch.fnmatchcase(title, spec.title)
    ]
    if not refs:
        titles = [title for _, title in commits]
        raise CheckpointSpecError(
            f"None of the {len(titles)} commits of '{spec.repo}' at '{branch}' has a title that "
            f"matches '{spec.title}'; the last ones are {few([repr(title) for title in titles])}."
        )
    return refs


def list_repositories(
    spec: HubSpec, endpoint: str | None, pattern: re.Pattern[str] | None = None
) -> list[CheckpointRef]:
    """One checkpoint for each repository of an organisation whose name matches.

    Raises:
        CheckpointSpecError: none matches.
    """
    owner = spec.repo.partition("/")[0]
    commits = hub.list_repositories(owner, endpoint=endpoint)
    refs = []
    for repo, commit in sorted(commits.items()):
        if fnmatch.fnmatchcase(repo, spec.repo):
            # The Hub states the commit of main; that of another revision is found when inspected.
            known = commit if spec.revision in ("", "main") else ""
            revision = hub.HubRevision(spec.revision or "main", known)
            name = repo.partition("/")[2]
            refs.append(hub_reference(repo, revision, parse_checkpoint_name(name, pattern), name))
    if not refs:
        raise CheckpointSpecError(
            f"'{owner}' has {len(commits)} model repositories on {endpoint_url(endpoint)}, "
            f"none of which matches '{spec.repo}'.{nearest(spec.repo, commits)}"
        )
    return refs


def path_matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; ``**`` stands for any number."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(path_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and path_matches(parts[1:], pattern[1:])
    )


def _below(folders: dict[str, hub.HubRevision], pattern: Sequence[str]) -> list[hub.HubRevision]:
    return [f for path, f in folders.items() if path_matches(path.split("/"), pattern)]


def _subfolder_reference(
    repo: str, folder: hub.HubRevision, pattern: re.Pattern[str] | None
) -> CheckpointRef:
    path = folder.subfolder
    return hub_reference(repo, folder, _parse_path(path, pattern), path.rpartition("/")[2])


def _is_whole(folder: hub.HubRevision) -> bool:
    layout = folder.layout
    names = {file.name for file in folder.files}
    return layout is not None and bool(layout.weights) and layout.config in names


def _parse_path(path: str, pattern: re.Pattern[str] | None) -> CheckpointName:
    """The parts of a path's names; the last name that gives a step counts (``step100/hf``)."""
    parts = path.split("/")
    heads = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
    parsed = [parse_checkpoint_name(head, pattern) for head in heads]
    return next((name for name in parsed if name.is_numbered), parsed[0])


def _parse_title(title: str, pattern: re.Pattern[str] | None) -> CheckpointName:
    """The parts of a title such as "Training in progress, step 500"."""
    return parse_checkpoint_name(re.sub(r"[/\\]", "-", title), pattern)  # it is no path
