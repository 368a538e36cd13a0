"""Published data that the shipped studies read: listed in ``published.yaml``, fetched and verified.

A file is downloaded beside its place and renamed when all of it is there. Its sha256 is compared
with the published one: that of the list, or the one that the Hugging Face Hub states. What has no
published one is trusted once. ``SHA256SUMS`` in the folder keeps what arrived, so that a later
change is noticed. A file that differs is never replaced: it may be somebody's own.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ke_ray.checkpoints.hub_api import endpoint_url
from ke_ray.checkpoints.retries import AbsentError, RetryPolicy
from ke_ray.checkpoints.transfer import fetch_file, public_url
from ke_ray.config import Strict, validate
from ke_ray.errors import CheckpointError, DataError, nearest
from ke_ray.storage import write_atomic
from ke_ray.storage.disk import is_disk_error
from ke_ray.storage.safe_yaml import parse_yaml

_LIST = Path(__file__).with_name("published.yaml")
_SUMS = "SHA256SUMS"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hf:(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")


class _File(Strict):
    name: str
    size_bytes: int | None = None
    sha256: str | None = Field(None, pattern=_SHA256.pattern)


class _Entry(Strict):
    title: str
    page: str
    licence: str
    folder: str
    base: str = ""
    files: dict[str, _File] = Field(default_factory=dict)
    names: str = ""
    numbers: tuple[int, int] | None = Field(None, strict=False)
    mean_bytes: int | None = None


@dataclass(frozen=True)
class PublishedFile:
    """A file: its name here, where it is published, and what it must be, as far as is known."""

    name: str
    url: str
    size_bytes: int | None
    sha256: str | None


@dataclass(frozen=True)
class PublishedData:
    """A set of files that belong into one folder.

    Attributes:
        folder: below the folder for data (``data`` in the shipped studies).
        size_bytes: of all files; from the published mean where single sizes are not known.
    """

    name: str
    title: str
    page: str
    licence: str
    folder: str
    files: tuple[PublishedFile, ...]
    size_bytes: int


@dataclass(frozen=True)
class FetchedFile:
    """What became of a file.

    Attributes:
        fetched: False where it was there already.
        verified: whether its sha256 is a published one, or the one it had when it arrived.
    """

    path: Path
    size_bytes: int
    fetched: bool
    verified: bool


def list_published() -> dict[str, PublishedData]:
    """All sets by name."""
    values: dict[str, Any] = parse_yaml(_LIST.read_text(encoding="utf-8"), str(_LIST))
    return {
        name: _published(name, validate(_Entry, entry, f"{_LIST.name}, {name}"))
        for name, entry in values.items()
    }


def find_published(name: str) -> PublishedData:
    """A set by name.

    Raises:
        DataError: there is none of this name.
    """
    published = list_published()
    if name not in published:
        raise DataError(
            f"There is no published data '{name:.100}'; give one of {', '.join(published)}."
            f"{nearest(name, published)}"
        )
    return published[name]


def _published(name: str, entry: _Entry) -> PublishedData:
    files = [
        PublishedFile(own, _address(entry.base, file.name), file.size_bytes, file.sha256)
        for own, file in entry.files.items()
    ]
    if entry.numbers:
        first, last = entry.numbers
        names = [entry.names.format(number) for number in range(first, last + 1)]
        files += [PublishedFile(own, _address(entry.base, own), None, None) for own in names]
    size_bytes = sum(file.size_bytes or entry.mean_bytes or 0 for file in files)
    texts = (name, entry.title, entry.page, entry.licence, entry.folder)
    return PublishedData(*texts, files=tuple(files), size_bytes=size_bytes)


def _address(base: str, name: str) -> str:
    address = name if name.startswith("hf:") else f"{base}/{name}"
    hub = _HUB.fullmatch(address)
    if hub is None:
        return address
    return f"{endpoint_url()}/datasets/{hub['repo']}/resolve/{hub['revision']}/{hub['path']}"


def missing_files(data: PublishedData, root: Path) -> list[Path]:
    """The places of files that are not there."""
    places = [root / data.folder / file.name for file in data.files]
    return [place for place in places if not place.is_file()]


def fetch(
    data: PublishedData,
    root: Path,
    *,
    mirror: str | None = None,
    policy: RetryPolicy | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[FetchedFile]:
    """Fetch what is missing of a set into ``<root>/<folder>``, and verify what is there.

    Args:
        mirror: an address that has the same files as ``<mirror>/<folder>/<name>``.
        policy: the patience of a download.
        say: is told of each download before it begins.

    Raises:
        DataError: a file cannot be fetched, is not the published one, or was changed.
    """
    if mirror and "://" not in mirror:
        raise DataError(f"The mirror '{mirror}' is no address; give one such as https://host/path.")
    folder = root / data.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sums = _read_sums(folder)
        for file in data.files:
            url = file.url
            if mirror:
                own = Path(data.folder, file.name).with_suffix(Path(url).suffix)
                url = f"{mirror.rstrip('/')}/{own.as_posix()}"
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            yield _fetch_file(file, url, path, sums, policy, say)
            _write_sums(folder, sums)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"Cannot write into '{folder}': {reason}. Give another --folder."
        ) from error


def _fetch_file(
    file: PublishedFile,
    url: str,
    path: Path,
    sums: dict[str, str],
    policy: RetryPolicy | None,
    say: Callable[[str], None],
) -> FetchedFile:
    is_converted = url.endswith(".parquet") and path.suffix == ".jsonl"
    expected = file.sha256 or (None if is_converted else sums.get(file.name))
    size_bytes, stated = (None, None) if expected else _stated(url)
    expected = expected or stated
    if path.is_file():
        expected = sums.get(file.name) if is_converted else expected
        digest = _sha256(path)
        if expected and digest != expected:
            ours = file.name in sums and not file.sha256
            origin = "it had when it arrived" if ours else f"published at {public_url(url)}"
            raise DataError(
                f"'{path}' has changed: its sha256 is {digest}, expected {expected} ({origin}). "
                "Move it away, then run the same command again to fetch it anew."
            )
        return FetchedFile(path, path.stat().st_size, fetched=False, verified=expected is not None)
    size_bytes = file.size_bytes or size_bytes
    _check_room(path, size_bytes)
    say(f"{path} from {public_url(url)}" + (f", {size_bytes:,} bytes" if size_bytes else ""))
    # Verified before it gets its name: a study that runs meanwhile never reads a wrong file.
    arrived = path.with_name(f".{path.name}.arrived")
    try:
        arrived_sha256 = fetch_file(url, arrived, policy=policy, hashed=True) or ""
    except AbsentError as error:
        raise DataError(
            f"'{path}' is missing, and {public_url(url)} has no such file. Put it there yourself, "
            "or name a copy with --mirror."
        ) from error
    except CheckpointError as error:
        raise DataError(f"'{path}' is missing. {error}") from error
    except OSError as error:
        if is_disk_error(error):
            raise
        raise DataError(f"'{path}' is missing and cannot be fetched: {error}.") from error
    if expected and arrived_sha256 != expected:
        arrived.unlink()
        raise DataError(
            f"What {public_url(url)} holds is not what was published: its sha256 is "
            f"{arrived_sha256}, expected {expected}. It was expected at '{path}' and is not kept."
        )
    if is_converted:
        _to_json_lines(arrived)
    sums[file.name] = _sha256(arrived) if is_converted else arrived_sha256
    arrived.rename(path)
    return FetchedFile(path, path.stat().st_size, fetched=True, verified=expected is not None)


def _to_json_lines(path: Path) -> None:
    """Rewrite a Parquet file as JSON lines, one per row."""
    import pyarrow.parquet as pq  # slow to import, and only one source needs it

    rows = pq.read_table(path).to_pylist()
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """The Hub states a file's hash in its own answer, not in that of its store."""


def _stated(url: str) -> tuple[int | None, str | None]:
    """(size, sha256) that the Hugging Face Hub states of a file; None where a server does not."""
    request = urllib.request.Request(url, headers={"User-Agent": "ke_ray"}, method="HEAD")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=30) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        headers = error.headers  # a redirect, or an error that the download meets again
    except (OSError, http.client.HTTPException):
        return None, None
    size, tag = headers.get("X-Linked-Size", ""), headers.get("X-Linked-ETag", "").strip('"')
    return int(size) if size.isdecimal() else None, tag if _SHA256.fullmatch(tag) else None


def _check_room(path: Path, size_bytes: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if size_bytes and size_bytes > free:
        raise DataError(
            f"'{path}' has {size_bytes:,} bytes, but {free:,} are free on its disk. Make room, or "
            "give another --folder."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / _SUMS
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {
        line[1].strip(): line[0] for line in lines if len(line) == 2 and _SHA256.fullmatch(line[0])
    }


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_atomic(str(folder / _SUMS), "".join(lines))


def how_to_get(source: str) -> str:
    """A sentence on how to fetch a source that is not there; empty where it is not published."""
    for data in list_published().values():
        if source.startswith(f"data/{data.folder}/"):
            return f" 'ke-ray data fetch {data.name}' fetches it."
    return ""
