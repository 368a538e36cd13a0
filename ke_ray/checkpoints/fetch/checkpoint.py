"""The whole of one checkpoint, copied from its source into a local folder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from ke_ray.checkpoints import hub
from ke_ray.checkpoints.formats.layout import Layout, layout_of
from ke_ray.checkpoints.pieces import (
    CONNECTIONS,
    FILES_AT_ONCE,
    Version,
    discard,
    either,
    fetch_pieces,
    finish,
    run_in_order,
)
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.retries import ChangedError, Retries, RetryPolicy, TransferError
from ke_ray.checkpoints.transfer import download, probe, public_url
from ke_ray.errors import CheckpointError, CheckpointSpecError, StoreOutageError
from ke_ray.storage import list_dir, on_store

_CHUNK = 4 * 2**20
# What drivers call a version of a file, the best first.
_TAGS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
MAX_TEXT_BYTES = 64 * 2**20  # of a configuration or a tokenizer
# At a bare URL nothing can be listed. These are requested in order; the first weights count.
_NATIVE = ("config.yaml", ("model.safetensors", "model.pt"))
_HF = ("config.json", ("model.safetensors", "pytorch_model.bin"))
_OPTIONAL = ("tokenizer.json",)


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def size_to_fetch(ref: CheckpointRef, endpoint: str | None = None) -> int | None:
    """Bytes of a checkpoint that is not local; None where its source does not tell."""
    if ref.size_bytes is not None:
        return ref.size_bytes
    try:
        if ref.format == "hub":
            return _hub_revision(ref, endpoint).size_bytes
        if _is_http(ref.location):
            return _http_size(ref.location)
        fs, path, layout = _remote_layout(ref)
        return sum(int(fs.info(f"{path}/{name}")["size"]) for name in layout.files)
    except (CheckpointError, CheckpointSpecError, OSError, KeyError, TypeError):
        return None  # the fetch itself will say what is wrong


def fetch_into(
    ref: CheckpointRef,
    folder: Path,
    *,
    endpoint: str | None = None,
    policy: RetryPolicy | None = None,
    should_stop: Callable[[], bool] | None = None,
    max_bytes: int | None = None,
) -> None:
    """Fill ``folder`` with the files of ``ref``; what an earlier try left there is resumed.

    Args:
        max_bytes: of weights that a web server sends; it may have announced fewer.

    Raises:
        CheckpointError: the source is gone, incomplete or refuses.
        StoreOutageError: its store was out of order for too long.
        OSError: the local disk refused.
    """
    policy = policy or RetryPolicy()
    if ref.format == "hub":
        _fetch_hub(ref, folder, endpoint, policy, should_stop)
    elif _is_http(ref.location):
        _fetch_http(ref, folder, policy, should_stop, max_bytes)
    else:
        _fetch_remote(ref, folder, policy, should_stop)


def _hub_revision(ref: CheckpointRef, endpoint: str | None) -> hub.HubRevision:
    revision = hub.HubRevision(
        ref.revision or ref.commit or "main", ref.commit or "", subfolder=ref.subfolder
    )
    return hub.inspect_revisions([(ref.repo or "", revision)], endpoint=endpoint)[0]


def _fetch_hub(
    ref: CheckpointRef,
    folder: Path,
    endpoint: str | None,
    policy: RetryPolicy,
    should_stop: Callable[[], bool] | None,
) -> None:
    try:
        revision = _hub_revision(ref, endpoint)
    except CheckpointSpecError as error:
        raise CheckpointError(str(error)) from error
    layout = revision.layout
    if layout is None or not layout.weights:
        raise CheckpointError(f"'{ref.label}' holds no config.json with weights.")
    files = [file for file in revision.files if file.name in layout.files]
    hub.download_files(
        *(ref.repo or "", revision.commit, files, folder),
        endpoint=endpoint,
        policy=policy,
        should_stop=should_stop,
    )


def _fetch_http(
    ref: CheckpointRef,
    folder: Path,
    policy: RetryPolicy,
    should_stop: Callable[[], bool] | None,
    max_bytes: int | None,
) -> None:
    base = ref.location.rstrip("/")

    def get(name: str, limit: int | None = MAX_TEXT_BYTES) -> bool:
        return (folder / name).exists() or download(
            f"{base}/{name}",
            folder / name,
            policy=policy,
            should_stop=should_stop,
            max_bytes=limit,
        )

    for config, weights in (_NATIVE, _HF):
        if not get(config):
            continue
        if not any(get(name, max_bytes) for name in weights):
            raise CheckpointError(
                f"{public_url(base)} has {config} but none of {', '.join(weights)}; is it an "
                "unsharded checkpoint?"
            )
        for name in _OPTIONAL if config == "config.json" else ():
            get(name)
        return
    raise CheckpointError(f"{public_url(base)} has neither config.yaml nor config.json.")


def _http_size(location: str) -> int | None:
    base = location.rstrip("/")
    for config, weights in (_NATIVE, _HF):
        if probe(f"{base}/{config}") is None:
            continue
        for name in weights:
            file = probe(f"{base}/{name}")
            if file is not None:
                return file.size_bytes
    return None


def _remote_layout(ref: CheckpointRef) -> tuple[Any, str, Layout]:
    try:
        fs, path = fsspec.core.url_to_fs(ref.location)
        names = set(list_dir(ref.location))
    except StoreOutageError:  # which says nothing about the checkpoint
        raise
    except Exception as error:  # each driver has its own errors
        raise CheckpointError(f"Cannot list '{public_url(ref.location)}': {error}.") from error
    layout = layout_of(names)
    if layout is None or not layout.weights or layout.config not in names:
        raise CheckpointError(
            f"'{public_url(ref.location)}' is not a checkpoint folder: it needs config.json (or "
            "config.yaml) and weights."
        )
    return fs, path.rstrip("/"), layout


def _fetch_remote(
    ref: CheckpointRef,
    folder: Path,
    policy: RetryPolicy,
    should_stop: Callable[[], bool] | None,
) -> None:
    fs, path, layout = _remote_layout(ref)
    stopped = threading.Event()

    def fetch(name: str) -> None:
        if (folder / name).exists():
            return
        try:
            file = _StoredFile(fs, f"{path}/{name}", ref.location)
            file.fetch(folder / name, policy, either(stopped.is_set, should_stop))
        except FileNotFoundError as error:
            raise CheckpointError(f"'{ref.label}' has no {name}.") from error
        except TransferError as error:
            raise CheckpointError(
                f"Cannot fetch {name} of '{public_url(ref.location)}': {error}. Run the same "
                "command again to resume."
            ) from error

    # Drivers that are not asynchronous have one connection, which threads may not share.
    at_once = FILES_AT_ONCE if getattr(fs, "async_impl", False) else 1
    for _ in run_in_order([partial(fetch, name) for name in layout.files], at_once, stopped):
        pass


@dataclass(frozen=True)
class _StoredFile:
    """A file on an object store, read in ranges by its fsspec driver."""

    fs: Any
    path: str
    location: str

    def fetch(self, target: Path, policy: RetryPolicy, should_stop: Callable[[], bool]) -> None:
        """Fetch the file to ``target``, anew where it changes meanwhile."""
        incomplete = target.with_name(f"{target.name}.incomplete")
        connections = CONNECTIONS if getattr(self.fs, "async_impl", False) else 1
        retries = Retries(policy)
        while True:
            version = self.version()
            try:
                fetch_pieces(
                    *(version, self.read, incomplete),
                    policy=policy,
                    should_stop=should_stop,
                    connections=connections,
                )
                if self.version() != version:
                    raise ChangedError("the file changed while it was fetched")
                finish(incomplete, target)
                return
            except ChangedError:
                discard(incomplete)
                if not retries.wait():
                    raise

    def version(self) -> Version:
        """As the store states it now."""

        def ask() -> dict[str, Any]:
            self.fs.invalidate_cache(self.path.rpartition("/")[0])
            return dict(self.fs.info(self.path))

        info = on_store(self.location, ask)
        tags = (str(info[key]) for key in _TAGS if info.get(key))
        return Version(int(info["size"]), next(tags, ""))

    def read(self, start: int, stop: int) -> Generator[bytes]:
        """The bytes of a range."""
        for position in range(start, stop, _CHUNK):
            end = min(position + _CHUNK, stop)
            ask = partial(self.fs.cat_file, self.path, start=position, end=end)
            data = on_store(self.location, ask)
            if len(data) != end - position:
                raise TransferError(
                    f"{len(data):,} bytes arrived of the {end - position:,} from {position:,} on"
                )
            yield data
