"""Requests to the Hugging Face Hub: timeouts, retries, and what went wrong in one sentence."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ke_ray.checkpoints.retries import Retries, RetryPolicy, TransferError
from ke_ray.checkpoints.transfer import RETRIED_STATUSES, retry_after_s
from ke_ray.errors import CheckpointSpecError
from ke_ray.storage.disk import is_disk_error

_LIST_POLICY = RetryPolicy(attempts=4, backoff_s=0.5, max_retry_after_s=330.0, timeout_s=10.0)
_MAX_ENTRIES = 100_000  # of one answer in pages

T = TypeVar("T")


def endpoint_url(endpoint: str | None = None) -> str:
    """The Hub to talk to: the argument, ``HF_ENDPOINT``, or huggingface.co."""
    return (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


class HubApi:
    """GET with a timeout and retries; a rate limit holds all threads of this client back."""

    def __init__(self, base: str) -> None:
        self.base = base
        self._lock = threading.Lock()
        self._not_before = 0.0

    def get(self, url: str, *, attempts: int | None = None) -> Any:
        """The JSON at a URL."""
        return self._response(url, attempts).json()

    def get_pages(self, url: str) -> list[dict[str, Any]]:
        """The entries of all pages of an answer.

        Raises:
            CheckpointSpecError: they are too many.
        """
        entries: list[dict[str, Any]] = []
        page: str | None = url
        while page:
            if len(entries) >= _MAX_ENTRIES:
                raise CheckpointSpecError(
                    f"{url} lists more than {_MAX_ENTRIES:,} entries. Name fewer: one subfolder, "
                    "or rows of a CSV list such as hf://org/name@revision."
                )
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
        return with_retries(request, policy, on_rate_limit=self._postpone)

    def _postpone(self, pause_s: float) -> None:
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + pause_s)


def with_retries(
    call: Callable[[], T],
    policy: RetryPolicy,
    *,
    on_rate_limit: Callable[[float], None] | None = None,
) -> T:
    """The result of ``call()``, repeated under ``policy`` where that may help."""
    retries = Retries(policy)
    while True:
        try:
            return call()
        except Exception as error:
            status = _status(error)
            final = status is not None and status not in RETRIED_STATUSES
            final = final or type(error).__name__ == "OfflineModeIsEnabled" or is_disk_error(error)
            headers = getattr(getattr(error, "response", None), "headers", None)
            after_s = retry_after_s(headers or {})
            if not final and after_s is not None and on_rate_limit is not None:
                on_rate_limit(policy.pause_s(1, after_s))
            if not retries.wait(after_s, final=final):
                raise


def _status(error: BaseException) -> int | None:
    if isinstance(error, TransferError):
        return error.status
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(
    error: BaseException, repo: str, revision: str | None, base: str, name: str | None = None
) -> str:
    """A sentence on an error of the Hub, and what to do."""
    what = f"'{repo}'" + (f" at '{revision}'" if revision else "") + (f" ({name})" if name else "")
    if isinstance(error, CheckpointSpecError):
        return str(error)
    kind = type(error).__name__
    if kind == "RevisionNotFoundError":
        return f"The Hub has no revision '{revision}' of '{repo}'."
    if kind == "GatedRepoError" or getattr(error, "code", None) == "GatedRepo":
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
