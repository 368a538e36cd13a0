"""Files over HTTP that arrive whole.

A download goes to ``<name>.incomplete``, in ranges over several connections where the server has
them, and is renamed when every byte is there. A connection that breaks, stalls or ends early is
resumed where it stopped (if the file is still the same), after a growing pause or as long as the
server asks for (``Retry-After``). Only attempts that bring no new byte count against the limit.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import http.client
import logging
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar

from ke_ray import secrets
from ke_ray.checkpoints.pieces import (
    FIRST_PIECE_BYTES,
    Version,
    arrived_bytes,
    discard,
    fetch_pieces,
    finish,
    noted_version,
)
from ke_ray.checkpoints.retries import (
    AbsentError,
    ChangedError,
    Retries,
    RetryPolicy,
    TransferError,
)
from ke_ray.errors import CheckpointError
from ke_ray.storage.disk import is_disk_error

_LOG = logging.getLogger(__name__)
_CHUNK = 2**20
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_ABSENT = (403, 404, 410)  # object stores answer 403 for a key that does not exist
_WEB_PAGES = (".html", ".htm")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_RATE_LIMIT = re.compile(r";\s*r=0;\s*t=([0-9]{1,6})")
_HEADERS = {"User-Agent": "ke_ray", "Accept-Encoding": "identity"}

T = TypeVar("T")


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another web address only; urllib would follow one to FTP."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.HTTPError(newurl, 400, "redirect to no web address", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        login = req.unredirected_hdrs.get("Authorization")
        if request is not None and login and _origin(newurl) == _origin(req.full_url):
            request.add_unredirected_header("Authorization", login)
        return request


def _origin(url: str) -> tuple[str, str]:
    return urllib.parse.urlsplit(url)[:2]


_OPENER = urllib.request.build_opener(_WebRedirects)


@dataclass(frozen=True)
class HttpFile:
    """A file on a server; ``size_bytes`` is None where the server does not tell."""

    size_bytes: int | None


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
    try:
        fetch_file(url, target, policy=policy, should_stop=should_stop, max_bytes=max_bytes)
    except AbsentError:
        return False
    return True


def fetch_file(
    url: str,
    target: Path,
    *,
    headers: Mapping[str, str] | None = None,
    policy: RetryPolicy | None = None,
    should_stop: Callable[[], bool] | None = None,
    max_bytes: int | None = None,
    hashed: bool = False,
) -> str | None:
    """Fetch ``url`` to the file ``target``.

    Args:
        headers: of the requests; ``Authorization`` is not carried to another host.
        policy: for the first request, and for each piece.
        should_stop: called while bytes arrive.
        max_bytes: that the file may have.
        hashed: whether the sha256 is wanted.

    Returns:
        The sha256, where it is wanted.

    Raises:
        AbsentError: the server has no such file.
        CheckpointError: it could not be fetched whole, or has more than ``max_bytes``; its cause
            is the ``TransferError`` of the last attempt.
        OSError: the local disk refused.
    """
    partial = target.with_name(f"{target.name}.incomplete")
    file = _WebFile(url, dict(headers or {}), policy or RetryPolicy(), should_stop, max_bytes)
    retries = Retries(file.policy)
    if noted_version(partial) is None:
        discard(partial)
    while True:
        before = arrived_bytes(partial)
        try:
            digest = file.fetch(partial, hashed=hashed)
        except AbsentError:
            raise
        except TransferError as error:
            _LOG.info("%s: %s", public_url(url), error)
            if isinstance(error, ChangedError):
                discard(partial)
            after = arrived_bytes(partial)
            final = error.final or error.attempts > 0
            if not retries.wait(error.after_s, progressed=after > before, final=final):
                raise CheckpointError(
                    f"Cannot fetch {public_url(url)}: {error} (attempt "
                    f"{max(error.attempts, retries.failures)}; {after:,} bytes have arrived). "
                    "Check the address and the network, then run the same command again to resume."
                ) from error
        else:
            finish(partial, target)
            return digest


@dataclass(frozen=True)
class _WebFile:
    """A file on a web server, fetched in ranges where the server has them."""

    url: str
    headers: dict[str, str]
    policy: RetryPolicy
    should_stop: Callable[[], bool] | None
    max_bytes: int | None

    def fetch(self, partial: Path, *, hashed: bool) -> str | None:
        """One attempt, of which ``partial`` keeps what arrived.

        Ranges are for files with a strong tag or a date only: without one, parts of two versions
        could be put together. Others come over one connection, from their start.
        """
        version, first = noted_version(partial), None
        if version is None:
            first = self._request({"Range": f"bytes=0-{FIRST_PIECE_BYTES - 1}"}, may_be_empty=True)
            version = _version(first) if first is not None else None
            if version is None:
                return self._stream(first, partial, hashed=hashed)
        unread = [first] if first else []
        with first or nullcontext():
            if self.max_bytes is not None and version.size_bytes > self.max_bytes:
                raise self._too_large()
            return fetch_pieces(
                version,
                lambda start, stop: self._read(version, unread, start, stop),
                partial,
                policy=self.policy,
                should_stop=self.should_stop,
                hashed=hashed,
            )

    def _read(self, version: Version, unread: list[Any], start: int, stop: int) -> Generator[bytes]:
        """The bytes of a range, from the answer to the first request where it is that range's."""
        # If-Range: the range if the file is unchanged, else all of the new file.
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": version.tag}
        with unread.pop() if unread and start == 0 else self._request(headers) as response:
            position = _check_range(response, version, start)
            while position < stop and (chunk := _chunk_of(response, stop - position, self.policy)):
                position += len(chunk)
                # Of a whole file instead of a range, nothing until the range begins.
                yield chunk[max(0, len(chunk) - (position - start)) :]

    def _stream(self, response: Any | None, partial: Path, *, hashed: bool) -> str | None:
        discard(partial)
        digest, size = hashlib.sha256(), 0
        if response is None or response.status != 200:
            with response or nullcontext():
                response = self._request({})
        with response, partial.open("wb") as file:
            expected = _length(response)
            while chunk := _chunk_of(response, _CHUNK, self.policy):
                size += len(chunk)
                if self.max_bytes is not None and size > self.max_bytes:
                    file.truncate(0)
                    raise self._too_large()
                file.write(chunk)
                if hashed:
                    digest.update(chunk)
                if self.should_stop is not None and self.should_stop():
                    raise TransferError("the caller stopped it", final=True)
        if expected is not None and size != expected:
            raise TransferError(f"the connection ended after {size:,} of {expected:,} bytes")
        return digest.hexdigest() if hashed else None

    def _too_large(self) -> TransferError:
        return TransferError(f"the server sends more than {self.max_bytes:,} bytes", final=True)

    def _request(self, headers: dict[str, str], *, may_be_empty: bool = False) -> Any:
        """The answer to a GET; None where the range is none of the file's and that may be."""
        with _transfer_errors(self.policy):
            try:
                response = _open(self.url, self.headers | headers, self.policy.timeout_s)
            except urllib.error.HTTPError as error:
                code = error.headers.get("X-Error-Code")
                reason = f"HTTP {error.code} {error.reason}"
                if error.code == 416 and may_be_empty:
                    return None
                if error.code == 416:
                    raise ChangedError("the file at the server has become shorter") from error
                if error.code in _ABSENT and "If-Range" not in headers:
                    raise AbsentError(reason, final=True, status=error.code, code=code) from error
                raise TransferError(
                    reason,
                    final=error.code not in RETRIED_STATUSES,
                    after_s=retry_after_s(error.headers),
                    status=error.code,
                    code=code,
                ) from error
        path = urllib.parse.urlsplit(self.url).path
        if response.headers.get_content_type() == "text/html" and not path.endswith(_WEB_PAGES):
            response.close()
            raise TransferError("the server answers with a web page, not with the file", final=True)
        return response


def _chunk_of(response: Any, most: int, policy: RetryPolicy) -> bytes:
    with _transfer_errors(policy):
        return response.read1(min(_CHUNK, most))


@contextmanager
def _transfer_errors(policy: RetryPolicy) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise TransferError(f"no byte arrived for {policy.timeout_s:g} s") from error
    except (http.client.HTTPException, OSError) as error:
        if is_disk_error(error):
            raise
        raise TransferError(f"{type(error).__name__}: {error}") from error


def _tag(response: Any) -> str:
    """What the server calls this version of the file; empty where it does not say."""
    tags = (response.headers.get("ETag", "W/"), response.headers.get("Last-Modified", ""))
    return next((tag for tag in tags if not tag.startswith("W/")), "")


def _content_range(response: Any) -> tuple[int, int | None] | None:
    """(first byte, size of the whole file) of a partial answer."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != 206 or match is None:
        return None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _version(response: Any) -> Version | None:
    """The version that an answer to the first range states; None where ranges cannot be used."""
    content_range = _content_range(response)
    if content_range is None or content_range[0] != 0 or not content_range[1]:
        return None
    return Version(content_range[1], _tag(response)) if _tag(response) else None


def _check_range(response: Any, version: Version, start: int) -> int:
    """The position of the first byte that an answer brings.

    Raises:
        ChangedError: it is another version's.
        TransferError: it is another range's.
    """
    content_range = _content_range(response)
    if response.status == 206 and content_range is None:
        raise TransferError("the server does not say which bytes it sends", final=True)
    # Without ranges after all: the whole file, of which the beginning is passed over.
    first, size = content_range or (0, _length(response))
    tag = _tag(response) or (version.tag if content_range else "")
    if tag != version.tag or size not in (None, version.size_bytes):
        raise ChangedError("the file at the server has changed meanwhile")
    if content_range and first != start:
        raise TransferError(
            f"the server sends bytes from {first:,} on, but those from {start:,} were requested",
            final=True,
        )
    return first


def _open(url: str, headers: dict[str, str], timeout_s: float, method: str = "GET") -> Any:
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:
        url = urllib.parse.urlunsplit(parts._replace(netloc=host))
    headers = {name.title(): value for name, value in (_HEADERS | headers).items()}
    login = headers.pop("Authorization", "")
    if at:  # Python would take the password for a part of the address
        login = "Basic " + base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    request = urllib.request.Request(url, headers=headers, method=method)
    if login:  # not to follow a redirect to another host
        request.add_unredirected_header("Authorization", login)
    return _OPENER.open(request, timeout=timeout_s)


def _length(response: Any) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def retry_after_s(headers: Mapping[str, str] | Message) -> float | None:
    """Seconds that a server asks to wait for; a Retry-After has seconds or a date."""
    value = headers.get("Retry-After")
    if not value:
        # The Hugging Face Hub's own form: ratelimit: "api";r=0;t=55
        match = _RATE_LIMIT.search(headers.get("ratelimit") or "")
        return float(match.group(1)) + 1 if match else None
    if value.strip().isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
