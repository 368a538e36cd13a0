"""The Hugging Face Hub: revisions, files with their sha256, downloads.

Listing uses ``/refs`` (one call) and ``/tree/<commit>`` (one call per revision, a few at a time, or
one per 1,000 files for all subfolders), so that checkpoints with the same weights are recognised
before any download. Every call has a timeout. When the Hub limits the rate, all calls wait as long
as it says. A token is taken from where huggingface_hub finds it (``HF_TOKEN``) and only ever put
into a request header.

``find`` lists and inspects revisions, ``fetch`` downloads their files; both use this client.
"""

from __future__ import annotations

import hashlib
import re
import threading
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ke_ray.checkpoints.formats.layout import TOKENIZER_FILES, Layout, layout_of
from ke_ray.checkpoints.hub_api import HubApi, endpoint_url, explain
from ke_ray.checkpoints.pieces import FILES_AT_ONCE, FIRST_PIECE_BYTES, either, run_in_order
from ke_ray.checkpoints.retries import AbsentError, RetryPolicy, TransferError
from ke_ray.checkpoints.transfer import call_within, fetch_file
from ke_ray.errors import CheckpointError, CheckpointSpecError, nearest

_FIRST_ANSWER_S = 15.0
_CONCURRENCY = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a checkpoint: size in bytes, and its sha256 where it is stored through LFS.

    ``name`` is within the checkpoint's folder, ``path`` within the repository.
    """

    name: str
    size_bytes: int
    identity: str
    path: str


@dataclass(frozen=True)
class HubRevision:
    """A branch, tag or commit, the commit it stands for and, once inspected, its files.

    ``commit`` is empty where only the name is known; inspecting fills it in. With a ``subfolder``
    the files are that folder's, and the tokenizer at the repository's root where it has none.
    """

    name: str
    commit: str
    files: tuple[HubFile, ...] = ()
    subfolder: str = ""

    @property
    def layout(self) -> Layout | None:
        """Which of its files make the checkpoint; None where it holds none."""
        return layout_of(file.name for file in self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes to fetch."""
        layout = self.layout
        names = set(layout.files) if layout else set()
        return sum(file.size_bytes for file in self.files if file.name in names)

    @property
    def weights_fingerprint(self) -> str | None:
        """One identity for all its weight files, from the hashes the Hub states."""
        layout = self.layout
        if layout is None or not layout.weights:
            return None
        return lfs_fingerprint(f.identity for f in self.files if f.name in layout.weights)


def lfs_fingerprint(hashes: Iterable[str]) -> str:
    """One identity for weight files, from the ``sha256:…`` of each."""
    return "lfs-sha256:" + hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def list_revisions(repo: str, *, endpoint: str | None = None) -> list[HubRevision]:
    """All branches and tags of a model repository, without their files.

    Raises:
        CheckpointSpecError: no such repository, no access, or no network (raised within 20 s).
    """
    base = endpoint_url(endpoint)
    api = HubApi(base)
    url = f"{base}/api/models/{urllib.parse.quote(repo)}/refs"
    try:
        response = call_within(_FIRST_ANSWER_S, lambda: api.get(url, attempts=2))
    except Exception as error:
        raise CheckpointSpecError(explain(error, repo, None, base)) from error
    revisions: dict[str, HubRevision] = {}
    for group in ("branches", "tags"):
        for item in response.get(group) or []:
            revisions.setdefault(item["name"], HubRevision(item["name"], item["targetCommit"]))
    return list(revisions.values())


def find_revision(repo: str, name: str, *, endpoint: str | None = None) -> HubRevision:
    """One revision by its exact name or commit.

    Raises:
        CheckpointSpecError: there is none; the nearest name is offered.
    """
    revisions = {revision.name: revision for revision in list_revisions(repo, endpoint=endpoint)}
    if name in revisions:
        return revisions[name]
    if _COMMIT.fullmatch(name):
        return HubRevision(name, name)
    raise CheckpointSpecError(
        f"'{repo}' has no revision '{name}' among its {len(revisions)}."
        f"{nearest(name, revisions)} `ke-ray checkpoints` lists them."
    )


def inspect_revisions(
    revisions: Iterable[tuple[str, HubRevision]], *, endpoint: str | None = None
) -> list[HubRevision]:
    """Revisions of repositories with their commits and files: a request each, a few at a time.

    Raises:
        CheckpointSpecError: the Hub refused or could not be reached.
    """
    base = endpoint_url(endpoint)
    api = HubApi(base)

    def inspect(repo: str, revision: HubRevision) -> HubRevision:
        if not revision.commit:
            commit = find_revision(repo, revision.name, endpoint=endpoint).commit
            revision = replace(revision, commit=commit)
        folder = revision.subfolder
        entries = _tree(api, repo, revision, folder)
        if folder and f"{folder}/{TOKENIZER_FILES[0]}" not in {file.path for file in entries}:
            entries += _tree(api, repo, revision, "")
        return replace(revision, files=_files_of(folder, entries))

    with ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="ke_ray-hub") as pool:
        return list(pool.map(lambda pair: inspect(*pair), list(revisions)))


def inspect_folders(
    repo: str, revision: HubRevision, *, endpoint: str | None = None
) -> list[HubRevision]:
    """Every folder of a revision, at any depth, with its files: one request per 1,000 files.

    Raises:
        CheckpointSpecError: the Hub refused or could not be reached.
    """
    entries = _tree(HubApi(endpoint_url(endpoint)), repo, revision, "", recursive=True)
    by_folder: dict[str, list[HubFile]] = defaultdict(list)
    for file in entries:
        by_folder[file.path.rpartition("/")[0]].append(file)
    root = by_folder.pop("", [])
    return [
        replace(revision, subfolder=folder, files=_files_of(folder, [*files, *root]))
        for folder, files in by_folder.items()
    ]


def list_commits(repo: str, branch: str, *, endpoint: str | None = None) -> list[tuple[str, str]]:
    """``(commit, title)`` of a branch, the newest first.

    Raises:
        CheckpointSpecError: no such repository or branch, or it cannot be reached.
    """
    base = endpoint_url(endpoint)
    quoted = urllib.parse.quote(branch, safe="")
    url = f"{base}/api/models/{urllib.parse.quote(repo)}/commits/{quoted}?limit=1000"
    try:
        items = HubApi(base).get_pages(url)
    except Exception as error:
        raise CheckpointSpecError(explain(error, repo, branch, base)) from error
    return [(item["id"], item["title"]) for item in items]


def list_repositories(owner: str, *, endpoint: str | None = None) -> dict[str, str]:
    """The model repositories of an organisation or user, and the commit of ``main`` of each.

    Raises:
        CheckpointSpecError: the Hub refused or could not be reached.
    """
    base = endpoint_url(endpoint)
    query = urllib.parse.urlencode({"author": owner, "limit": 1000, "expand[]": "sha"})
    try:
        items = HubApi(base).get_pages(f"{base}/api/models?{query}")
    except Exception as error:
        raise CheckpointSpecError(explain(error, owner, None, base)) from error
    return {item["id"]: item.get("sha") or "" for item in items}


def _tree(
    api: HubApi, repo: str, revision: HubRevision, folder: str, *, recursive: bool = False
) -> list[HubFile]:
    commit = urllib.parse.quote(revision.commit, safe="")
    url = f"{api.base}/api/models/{urllib.parse.quote(repo)}/tree/{commit}"
    url += f"/{urllib.parse.quote(folder)}" if folder else ""
    try:
        entries = api.get_pages(f"{url}?recursive=true" if recursive else url)
    except Exception as error:
        raise CheckpointSpecError(explain(error, repo, revision.name, api.base, folder)) from error
    return [_file(entry) for entry in entries if entry.get("type") == "file"]


def _files_of(folder: str, entries: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """Those of ``entries`` that lie in a folder, and tokenizer files at the root that it lacks."""
    own, root = [], []
    for file in entries:
        parent, _, name = file.path.rpartition("/")
        if parent == folder:
            own.append(replace(file, name=name))
        elif not parent and name in TOKENIZER_FILES:
            root.append(file)
    # A tokenizer is taken from one place: its files belong together.
    has_tokenizer = any(file.name == TOKENIZER_FILES[0] for file in own)
    return (*own, *(() if has_tokenizer else root))


def download_file(
    repo: str,
    commit: str,
    path: str,
    target: Path,
    *,
    endpoint: str | None = None,
    policy: RetryPolicy | None = None,
    should_stop: Callable[[], bool] | None = None,
    max_bytes: int | None = None,
    hashed: bool = False,
) -> str | None:
    """Fetch one file of a commit, as ``transfer.fetch_file`` does: in ranges, and resumed.

    huggingface_hub's own download, through Xet too, begins a file anew after a kill.

    Returns:
        The sha256, where it is wanted.

    Raises:
        CheckpointError: it could not be fetched.
    """
    from huggingface_hub.utils import build_hf_headers

    base = endpoint_url(endpoint)
    parts = (urllib.parse.quote(repo), urllib.parse.quote(commit, safe=""))
    try:
        return fetch_file(
            f"{base}/{parts[0]}/resolve/{parts[1]}/{urllib.parse.quote(path)}",
            target,
            headers=build_hf_headers(),
            policy=policy,
            should_stop=should_stop,
            max_bytes=max_bytes,
            hashed=hashed,
        )
    except (AbsentError, CheckpointError) as error:
        cause = error if isinstance(error, AbsentError) else error.__cause__
        if isinstance(cause, TransferError) and cause.status in (401, 403, 404, 410):
            raise CheckpointError(explain(cause, repo, commit, base, path)) from error
        raise


def download_files(
    repo: str,
    commit: str,
    files: Iterable[HubFile],
    folder: Path,
    *,
    endpoint: str | None = None,
    policy: RetryPolicy | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Fetch files of a commit into ``folder``, a few at a time; whole ones are kept.

    Raises:
        CheckpointError: one could not be fetched, or has not the size, or the sha256 (of files in
            LFS), that the Hub states.
    """
    stopped = threading.Event()
    stop = either(stopped.is_set, should_stop)

    def fetch(file: HubFile) -> None:
        target = folder / file.name
        if target.exists():
            return
        arrived = target.with_name(f"{target.name}.unverified")
        kind, _, stated = file.identity.partition(":")
        sha256 = download_file(
            *(repo, commit, file.path, arrived),
            endpoint=endpoint,
            policy=policy,
            # What is small ends by itself, and is then there for the next run.
            should_stop=should_stop if file.size_bytes <= FIRST_PIECE_BYTES else stop,
            max_bytes=file.size_bytes,
            hashed=kind == "sha256",
        )
        size_bytes = arrived.stat().st_size
        if (size_bytes, sha256 or stated) != (file.size_bytes, stated):
            arrived.unlink()
            raise CheckpointError(
                f"'{repo}' at '{commit}': after the download {file.path} has {size_bytes:,} bytes "
                f"and {kind} {sha256 or stated}, but the Hub states {file.size_bytes:,} and "
                f"{stated}; it was removed. Run the same command again."
            )
        arrived.rename(target)

    for _ in run_in_order([partial(fetch, file) for file in files], FILES_AT_ONCE, stopped):
        pass


def _file(entry: dict[str, Any]) -> HubFile:
    lfs = entry.get("lfs") or {}
    sha256 = lfs.get("oid") or lfs.get("sha256")
    identity = f"sha256:{sha256}" if sha256 else f"git:{entry.get('oid')}"
    size_bytes = int(lfs.get("size") or entry.get("size") or 0)
    return HubFile(entry["path"], size_bytes, identity, path=entry["path"])
