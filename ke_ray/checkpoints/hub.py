"""The Hugging Face Hub: revisions, files with their sha256, downloads.

Listing uses ``/refs`` (one call) and ``/tree/<commit>`` (one call per revision, a few at a time, or
one per 1,000 files for all subfolders), so that checkpoints with the same weights are recognised
before any download; ``/commits`` and ``/api/models?author=`` list the commits of a branch and the
repositories of an organisation. Every call has a timeout. When the Hub limits the rate, all calls
wait as long as it says. A token is taken from where huggingface_hub finds it (``HF_TOKEN``) and
only ever put into a request header.

``find`` lists and inspects revisions, ``fetch`` downloads their files; both use this client.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ke_ray.checkpoints.formats.layout import TOKENIZER_FILES, Layout, layout_of
from ke_ray.checkpoints.transfer import (
    RETRIED_STATUSES,
    Retries,
    RetryPolicy,
    call_within,
    is_disk_error,
)
from ke_ray.errors import CheckpointError, CheckpointSpecError, nearest

_LIST_POLICY = RetryPolicy(attempts=4, backoff_s=0.5, max_retry_after_s=330.0, timeout_s=10.0)
_FIRST_ANSWER_S = 15.0
_CONCURRENCY = 8
_MAX_ENTRIES = 100_000  # of one answer in pages
_DOWNLOADS = ".hub"  # folder of unfinished downloads, inside that of the checkpoint
_COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


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
        hashes = [file.identity for file in self.files if file.name in layout.weights]
        return "lfs-sha256:" + hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def endpoint_url(endpoint: str | None = None) -> str:
    """The Hub to talk to: the argument, ``HF_ENDPOINT``, or huggingface.co."""
    return (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def list_revisions(repo: str, *, endpoint: str | None = None) -> list[HubRevision]:
    """All branches and tags of a model repository, without their files.

    Raises:
        CheckpointSpecError: no such repository, no access, or no network (raised within 20 s).
    """
    base = endpoint_url(endpoint)
    api = _Api(base)
    url = f"{base}/api/models/{urllib.parse.quote(repo)}/refs"
    try:
        response = call_within(_FIRST_ANSWER_S, lambda: api.get(url, attempts=2))
    except Exception as error:
        raise CheckpointSpecError(_explain(error, repo, None, base)) from error
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
    api = _Api(base)

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
    entries = _tree(_Api(endpoint_url(endpoint)), repo, revision, "", recursive=True)
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
        items = _Api(base).get_pages(url)
    except Exception as error:
        raise CheckpointSpecError(_explain(error, repo, branch, base)) from error
    return [(item["id"], item["title"]) for item in items]


def list_repositories(owner: str, *, endpoint: str | None = None) -> dict[str, str]:
    """The model repositories of an organisation or user, and the commit of ``main`` of each.

    Raises:
        CheckpointSpecError: the Hub refused or could not be reached.
    """
    base = endpoint_url(endpoint)
    query = urllib.parse.urlencode({"author": owner, "limit": 1000, "expand[]": "sha"})
    try:
        items = _Api(base).get_pages(f"{base}/api/models?{query}")
    except Exception as error:
        raise CheckpointSpecError(_explain(error, owner, None, base)) from error
    return {item["id"]: item.get("sha") or "" for item in items}


def _tree(
    api: _Api, repo: str, revision: HubRevision, folder: str, *, recursive: bool = False
) -> list[HubFile]:
    commit = urllib.parse.quote(revision.commit, safe="")
    url = f"{api.base}/api/models/{urllib.parse.quote(repo)}/tree/{commit}"
    url += f"/{urllib.parse.quote(folder)}" if folder else ""
    try:
        entries = api.get_pages(f"{url}?recursive=true" if recursive else url)
    except Exception as error:
        raise CheckpointSpecError(_explain(error, repo, revision.name, api.base, folder)) from error
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
    names = {file.name for file in own}
    # A tokenizer is taken from one place: its files belong together.
    return (*own, *(root if TOKENIZER_FILES[0] not in names else ()))


def download_files(
    repo: str,
    commit: str,
    paths: Mapping[str, str],
    folder: Path,
    *,
    endpoint: str | None = None,
    policy: RetryPolicy | None = None,
) -> None:
    """Fetch files of a commit into ``folder``, resumed and retried; whole ones are kept.

    Args:
        paths: path in the repository of each file, by its name in ``folder``.

    Raises:
        CheckpointError: one could not be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    base = endpoint_url(endpoint)
    policy = policy or RetryPolicy()
    downloads = folder / _DOWNLOADS
    for name, path in paths.items():
        if (folder / name).exists():
            continue

        def fetch(path: str = path) -> str:
            return hf_hub_download(
                repo, path, revision=commit, local_dir=downloads, endpoint=base, etag_timeout=10
            )

        try:
            fetched = _with_retries(fetch, policy)
        except Exception as error:
            if is_disk_error(error):
                raise
            raise CheckpointError(_explain(error, repo, commit, base, path)) from error
        Path(fetched).rename(folder / name)
    shutil.rmtree(downloads, ignore_errors=True)  # with the Hub client's own notes


class _Api:
    """GET with a timeout and retries; a rate limit holds all threads of this client back."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._lock = threading.Lock()
        self._not_before = 0.0

    def get(self, url: str, *, attempts: int | None = None) -> Any:
        return self._response(url, attempts).json()

    def get_pages(self, url: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        page: str | None = url
        while page:
            if len(entries) >= _MAX_ENTRIES:
                raise ValueError(f"it lists more than {_MAX_ENTRIES:,} entries")
            response = self._response(page, None)
            entries += response.json()
            page = (response.links or {}).get("next", {}).get("url")
            if page and not page.startswith(f"{self.base}/"):
                break  # never carry the token to another host
        return entries

    def _response(self, url: str, attempts: int | None) -> Any:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def request() -> Any:
            pause = self._not_before - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            response = get_session().get(
                url, headers=build_hf_headers(), timeout=_LIST_POLICY.timeout_s
            )
            hf_raise_for_status(response)
            return response

        policy = replace(_LIST_POLICY, attempts=attempts or _LIST_POLICY.attempts)
        return _with_retries(request, policy, on_rate_limit=self._postpone)

    def _postpone(self, pause_s: float) -> None:
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + pause_s)


def _with_retries(
    call: Callable[[], T],
    policy: RetryPolicy,
    *,
    on_rate_limit: Callable[[float], None] | None = None,
) -> T:
    retries = Retries(policy)
    while True:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            final = status is not None and status not in RETRIED_STATUSES
            final = final or type(error).__name__ == "OfflineModeIsEnabled" or is_disk_error(error)
            retry_after_s = _retry_after_s(error)
            if not final and retry_after_s is not None and on_rate_limit is not None:
                on_rate_limit(policy.pause_s(1, retry_after_s))
            if not retries.wait(retry_after_s, final=final):
                raise


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after_s(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    if value := headers.get("Retry-After"):
        return float(value) if str(value).isdigit() and len(str(value)) < 10 else None
    # The Hub's own form: ratelimit: "api";r=0;t=55
    match = re.search(r";\s*r=0;\s*t=([0-9]{1,6})", headers.get("ratelimit") or "")
    return float(match.group(1)) + 1 if match else None


def _file(entry: dict[str, Any]) -> HubFile:
    lfs = entry.get("lfs") or {}
    sha256 = lfs.get("oid") or lfs.get("sha256")
    identity = f"sha256:{sha256}" if sha256 else f"git:{entry.get('oid')}"
    size_bytes = int(lfs.get("size") or entry.get("size") or 0)
    return HubFile(entry["path"], size_bytes, identity, path=entry["path"])


def _explain(
    error: BaseException, repo: str, revision: str | None, base: str, name: str | None = None
) -> str:
    what = f"'{repo}'" + (f" at '{revision}'" if revision else "") + (f" ({name})" if name else "")
    kind = type(error).__name__
    if kind == "RevisionNotFoundError":
        return f"The Hub has no revision '{revision}' of '{repo}'."
    if kind == "GatedRepoError":
        return f"{what} on {base} is gated: accept its terms there and set HF_TOKEN."
    if kind == "RepositoryNotFoundError" or _status(error) in (401, 403, 404):
        return (
            f"There is no {what} on {base}, or it is private; check the spelling, and set "
            "HF_TOKEN where access needs it."
        )
    if kind in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") and _offline():
        return f"{what} needs the Hub, but HF_HUB_OFFLINE is set; unset it or give a folder."
    if _status(error) is not None:
        return f"{base} answered HTTP {_status(error)} for {what}; try again later."
    return (
        f"Cannot reach {base} for {what} ({kind}: {_short(error)}). Check the network and "
        "HF_ENDPOINT, or give a local folder."
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
