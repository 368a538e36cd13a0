"""One checkpoint, from wherever it lies into a local folder, whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ke_ray.checkpoints import hub
from ke_ray.checkpoints.fetch.transfer import RetryPolicy, download, probe, redact
from ke_ray.checkpoints.formats.layout import Layout, layout_of
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import CheckpointError, CheckpointSpecError
from ke_ray.storage import list_dir

__all__ = ["fetch_into", "size_to_fetch"]

_CHUNK = 4 * 2**20
# At a bare URL nothing can be listed: what is asked for, in order. The first weights found count.
_NATIVE = ("config.yaml", ("model.safetensors", "model.pt"))
_HF = ("config.json", ("model.safetensors", "pytorch_model.bin"))
_OPTIONAL = ("tokenizer.json",)


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def size_to_fetch(ref: CheckpointRef, endpoint: str | None = None) -> int | None:
    """Bytes of a checkpoint that is not local; None where its source does not say."""
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
) -> None:
    """Fill ``folder`` with the files of ``ref``; what an earlier try left there is resumed.

    Raises:
        CheckpointError: the source is gone, incomplete or refuses.
        OSError: the local disk refused.
    """
    policy = policy or RetryPolicy()
    if ref.format == "hub":
        _fetch_hub(ref, folder, endpoint, policy)
    elif _is_http(ref.location):
        _fetch_http(ref, folder, policy, should_stop)
    else:
        _fetch_remote(ref, folder, policy, should_stop)


def _hub_revision(ref: CheckpointRef, endpoint: str | None) -> hub.HubRevision:
    repo = ref.repo or ""
    if ref.commit is None:
        found = hub.find_revision(repo, ref.revision or "main", endpoint=endpoint)
    else:
        found = hub.HubRevision(ref.revision or ref.commit, ref.commit)
    return hub.inspect_revisions(repo, [found], endpoint=endpoint)[0]


def _fetch_hub(ref: CheckpointRef, folder: Path, endpoint: str | None, policy: RetryPolicy) -> None:
    try:
        revision = _hub_revision(ref, endpoint)
    except CheckpointSpecError as error:
        raise CheckpointError(str(error)) from error
    layout = revision.layout
    if layout is None or not layout.weights:
        raise CheckpointError(f"'{ref.label}' holds no config.json with weights.")
    sizes = {file.name: file.size_bytes for file in revision.files}
    wanted = [name for name in layout.files if name in sizes]
    hub.download_files(
        ref.repo or "", revision.commit, wanted, folder, endpoint=endpoint, policy=policy
    )
    for name in wanted:
        found = (folder / name).stat().st_size
        if found != sizes[name]:
            (folder / name).unlink()
            raise CheckpointError(
                f"'{ref.label}': {name} has {found:,} bytes after the download, the Hub states "
                f"{sizes[name]:,}; run again."
            )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the Hub client's own notes


def _fetch_http(
    ref: CheckpointRef,
    folder: Path,
    policy: RetryPolicy,
    should_stop: Callable[[], bool] | None,
) -> None:
    base = ref.location.rstrip("/")

    def get(name: str) -> bool:
        return (folder / name).exists() or download(
            f"{base}/{name}", folder / name, policy=policy, should_stop=should_stop
        )

    for config, weights in (_NATIVE, _HF):
        if not get(config):
            continue
        if not any(get(name) for name in weights):
            raise CheckpointError(
                f"{redact(base)} has {config} but none of {', '.join(weights)}; is it an "
                "unsharded checkpoint?"
            )
        for name in _OPTIONAL if config == "config.json" else ():
            get(name)
        return
    raise CheckpointError(f"{redact(base)} has neither config.yaml nor config.json.")


def _http_size(location: str) -> int | None:
    base = location.rstrip("/")
    for config, weights in (_NATIVE, _HF):
        if probe(f"{base}/{config}") is None:
            continue
        for name in weights:
            found = probe(f"{base}/{name}")
            if found is not None:
                return found.size_bytes
    return None


def _remote_layout(ref: CheckpointRef) -> tuple[Any, str, Layout]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(ref.location)
        names = set(list_dir(ref.location))
    except Exception as error:  # each driver has its own errors
        raise CheckpointError(f"Cannot list '{redact(ref.location)}': {error}.") from error
    layout = layout_of(names)
    if layout is None or not layout.weights or layout.config not in names:
        raise CheckpointError(
            f"'{redact(ref.location)}' is not a checkpoint folder: it needs config.json (or "
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
    for name in layout.files:
        failures = 0
        while not (folder / name).exists():
            try:
                _copy(fs, f"{path}/{name}", folder / name, should_stop)
            except CheckpointError:
                raise
            except FileNotFoundError as error:
                raise CheckpointError(f"'{ref.label}' has no {name}.") from error
            except Exception as error:  # each driver has its own errors
                failures += 1
                if failures >= policy.attempts:
                    raise CheckpointError(
                        f"Cannot fetch {name} of '{redact(ref.location)}': {error}."
                    ) from error
                time.sleep(policy.pause_s(failures, None))


def _copy(fs: Any, source: str, target: Path, should_stop: Callable[[], bool] | None) -> None:
    expected = fs.info(source)["size"]
    partial = target.with_name(f"{target.name}.incomplete")
    with fs.open(source, "rb") as reader, partial.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            if should_stop is not None and should_stop():
                raise CheckpointError(f"Fetching '{source}' was stopped.")
    found = partial.stat().st_size
    if found != expected:
        raise ConnectionError(f"{found:,} of {expected:,} bytes arrived")
    os.replace(partial, target)
