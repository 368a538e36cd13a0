"""Transfers: how they are retried, and files over HTTP that arrive whole.

A download goes to ``<name>.incomplete`` and is renamed when every byte is there. A connection
that breaks, stalls or ends early is resumed where it stopped (if the file is still the same),
after a growing pause or as long as the server asks for (``Retry-After``). Only attempts that
bring no new byte count against the limit.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ke_ray import secrets
from ke_ray.errors import CheckpointError
from ke_ray.storage.disk import is_disk_error

_LOG = logging.getLogger(__name__)
_CHUNK = 2**20
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_ABSENT = (403, 404, 410)  # object stores answer 403 for a key that does not exist
_HEADERS = {"User-Agent": "ke_ray", "Accept-Encoding": "identity"}

T = TypeVar("T")


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another web address only; urllib would follow one to FTP."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.HTTPError(newurl, 400, "redirect to no web address", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_WebRedirects)


@dataclass(frozen=True)
class RetryPolicy:
    """The patience of a transfer; times in seconds.

    Pauses are ``backoff_s``, twice that, four times … at most ``max_pause_s``, each with up to a
    quarter more at random, so that many workers do not come back in step. A server's
    ``Retry-After`` takes precedence, up to ``max_retry_after_s``.
    """

    attempts: int = 6
    backoff_s: float = 1.0
    max_pause_s: float = 60.0
    max_retry_after_s: float = 600.0
    timeout_s: float = 30.0

    def pause_s(self, failures: int, retry_after_s: float | None) -> float:
        """Seconds to wait after the ``failures``-th failure in a row (from 1)."""
        if retry_after_s is not None:
            return min(retry_after_s, self.max_retry_after_s)
        pause = min(self.backoff_s * 2 ** min(failures - 1, 30), self.max_pause_s)
        return pause * (1 + random.random() / 4)


class Retries:
    """The failures in a row of one transfer, under a policy."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.failures = 0

    def wait(
        self, retry_after_s: float | None = None, *, progressed: bool = False, final: bool = False
    ) -> bool:
        """Count a failure, then pause before the next attempt.

        Args:
            retry_after_s: what the server asks for.
            progressed: whether the failed attempt brought something; it is then the first failure.
            final: whether another attempt would fail in the same way.

        Returns:
            False, at once, where no attempt is left.
        """
        self.failures = 1 if progressed else self.failures + 1
        if final or self.failures >= self.policy.attempts:
            return False
        time.sleep(self.policy.pause_s(self.failures, retry_after_s))
        return True


@dataclass(frozen=True)
class HttpFile:
    """A file on a server; ``size_bytes`` is None where the server does not tell."""

    size_bytes: int | None


class _TransferError(Exception):
    def __init__(self, reason: str, *, final: bool = False, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.final = final
        self.after_s = after_s


class AbsentError(Exception):
    """The server has no such file."""


def public_url(url: str) -> str:
    """``url`` without user name, password and query, fit for messages."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # brackets that enclose no address
        return secrets.redact(url.partition("?")[0])
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.split("@")[-1], parts.path, "", ""))


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """The result of ``function()``, or TimeoutError; name resolution has no timeout of its own."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, function()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name="ke_ray-request")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    good, value = outcome[0]
    if good:
        return value
    raise value


def probe(url: str, *, timeout_s: float = 10.0) -> HttpFile | None:
    """Whether a file is there, and its size; None where the server says it is not.

    Raises:
        OSError: the server cannot be reached or answers with another error.
    """
    try:
        with _open(url, {}, timeout_s, method="HEAD") as response:
            return HttpFile(_length(response))
    except urllib.error.HTTPError as error:
        if error.code in _ABSENT:
            return None
        if error.code not in (400, 405, 501):
            raise OSError(f"HTTP {error.code} {error.reason}") from error
    # A server without HEAD: ask for the file and hang up.
    try:
        with _open(url, {}, timeout_s) as response:
            return HttpFile(_length(response))
    except urllib.error.HTTPError as error:
        if error.code in _ABSENT:
            return None
        raise OSError(f"HTTP {error.code} {error.reason}") from error
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def download(
    url: str,
    target: Path,
    *,
    policy: RetryPolicy | None = None,
    should_stop: Callable[[], bool] | None = None,
    max_bytes: int | None = None,
) -> bool:
    """Fetch ``url`` to the file ``target``; False where the server has no such file.

    Raises:
        CheckpointError: it could not be fetched whole, or has more than ``max_bytes``.
        OSError: the local disk refused.
    """
    policy = policy or RetryPolicy()
    partial = target.with_name(f"{target.name}.incomplete")
    retries = Retries(policy)
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _attempt(url, partial, policy.timeout_s, should_stop, max_bytes)
        except AbsentError:
            return False
        except _TransferError as error:
            after = partial.stat().st_size if partial.exists() else 0
            _LOG.info("%s: %s", public_url(url), error)
            if not retries.wait(error.after_s, progressed=after > before, final=error.final):
                raise CheckpointError(
                    f"Cannot fetch {public_url(url)}: {error} (attempt {retries.failures}; "
                    f"{after:,} bytes have arrived). Check the address and the network, then run "
                    "the same command again to resume."
                ) from error
        else:
            os.replace(partial, target)
            _tag(partial).unlink(missing_ok=True)
            return True


def _tag(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


def _attempt(
    url: str,
    partial: Path,
    timeout_s: float,
    should_stop: Callable[[], bool] | None,
    max_bytes: int | None,
) -> None:
    num_present = partial.stat().st_size if partial.exists() else 0
    headers = {}
    if num_present and _tag(partial).exists():
        # If-Range: the rest if the file is unchanged, else all of it anew.
        headers = {"Range": f"bytes={num_present}-", "If-Range": _tag(partial).read_text()}
    try:
        with _open(url, headers, timeout_s) as response:
            resumed = response.status == 206
            expected = _length(response)
            if expected is not None and resumed:
                expected += num_present
            etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if etag and not etag.startswith("W/"):
                _tag(partial).write_text(etag)
            else:
                _tag(partial).unlink(missing_ok=True)
            size = num_present if resumed else 0
            with partial.open("ab" if resumed else "wb") as file:
                while chunk := response.read1(_CHUNK):
                    size += len(chunk)
                    if max_bytes is not None and size > max_bytes:
                        file.truncate(0)
                        raise _TransferError(
                            f"the server sends more than {max_bytes:,} bytes", final=True
                        )
                    file.write(chunk)
                    if should_stop is not None and should_stop():
                        raise _TransferError("the caller stopped it", final=True)
        if expected is not None and size != expected:
            raise _TransferError(f"the connection ended after {size:,} of {expected:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code in _ABSENT:
            raise AbsentError from error
        if error.code == 416:  # the partial file is not part of this one
            partial.unlink(missing_ok=True)
            raise _TransferError("the partial file did not fit; starting anew") from error
        raise _TransferError(
            f"HTTP {error.code} {error.reason}",
            final=error.code not in RETRIED_STATUSES,
            after_s=_retry_after(error.headers.get("Retry-After")),
        ) from error
    except TimeoutError as error:
        raise _TransferError(f"no byte arrived for {timeout_s:g} s") from error
    except (http.client.HTTPException, OSError) as error:
        if is_disk_error(error):
            raise
        raise _TransferError(f"{type(error).__name__}: {error}") from error


def _open(url: str, headers: dict[str, str], timeout_s: float, method: str = "GET") -> Any:
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        url = urllib.parse.urlunsplit(parts._replace(netloc=host))
    request = urllib.request.Request(url, headers=_HEADERS | headers, method=method)
    if at:
        # Python would take the password for a part of the address. Not to follow a redirect.
        login = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")
    return _OPENER.open(request, timeout=timeout_s)


def _length(response: Any) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date."""
    if not value:
        return None
    if value.strip().isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
