"""The Hugging Face Hub: revisions, files with their sha256, downloads.

Listing uses two endpoints, ``/refs`` (one call) and ``/tree/<commit>`` (one call per revision, a
few at a time), so that checkpoints with the same weights are recognised before any download. Every
call has a timeout. When the Hub limits the rate, all calls wait as long as it says. A token is
taken from where huggingface_hub finds it (``HF_TOKEN``) and only ever put into a request header.

``find`` lists and inspects revisions, ``fetch`` downloads their files; both use this client.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ke_ray.checkpoints.formats.layout import Layout, layout_of
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
_COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


@dataclass(frozen=True)
class HubFile:
    """A file of a revision: size in bytes, and its sha256 where it is stored through LFS."""

    name: str
    size_bytes: int
    identity: str


@dataclass(frozen=True)
class HubRevision:
    """A branch or tag, the commit it stands for and, once inspected, its files."""

    name: str
    commit: str
    files: tuple[HubFile, ...] = ()

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
    repo: str, revisions: Iterable[HubRevision], *, endpoint: str | None = None
) -> list[HubRevision]:
    """The same revisions with their files: one request per revision, a few at a time.

    Raises:
        CheckpointSpecError: the Hub refused or could not be reached.
    """
    base = endpoint_url(endpoint)
    api = _Api(base)

    def inspect(revision: HubRevision) -> HubRevision:
        commit = urllib.parse.quote(revision.commit, safe="")
        url = f"{base}/api/models/{urllib.parse.quote(repo)}/tree/{commit}"
        try:
            entries = api.get_pages(url)
        except Exception as error:
            raise CheckpointSpecError(_explain(error, repo, revision.name, base)) from error
        files = tuple(_file(entry) for entry in entries if entry.get("type") == "file")
        return HubRevision(revision.name, revision.commit, files)

    with ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="ke_ray-hub") as pool:
        return list(pool.map(inspect, list(revisions)))


def download_files(
    repo: str,
    commit: str,
    names: Iterable[str],
    folder: Path,
    *,
    endpoint: str | None = None,
    policy: RetryPolicy | None = None,
) -> None:
    """Fetch files of a commit into ``folder``, resumed and retried.

    Raises:
        CheckpointError: one could not be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    base = endpoint_url(endpoint)
    policy = policy or RetryPolicy()
    for name in names:

        def fetch(name: str = name) -> str:
            return hf_hub_download(
                repo, name, revision=commit, local_dir=folder, endpoint=base, etag_timeout=10
            )

        try:
            _with_retries(fetch, policy)
        except Exception as error:
            if is_disk_error(error):
                raise
            raise CheckpointError(_explain(error, repo, commit, base, name)) from error


class _Api:
    """GET with a timeout and retries; a rate limit holds all threads of this client back."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._not_before = 0.0

    def get(self, url: str, *, attempts: int | None = None) -> Any:
        return self._response(url, attempts).json()

    def get_pages(self, url: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        page: str | None = url
        while page and len(entries) < 100_000:
            response = self._response(page, None)
            entries += response.json()
            page = (response.links or {}).get("next", {}).get("url")
            if page and not page.startswith(f"{self._base}/"):
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
    return HubFile(entry["path"], int(lfs.get("size") or entry.get("size") or 0), identity)


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
