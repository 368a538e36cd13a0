"""Documents of a dataset on the Hugging Face Hub, streamed: ``hf:name[:config][:split]``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ke_ray.data.deadline import START_TIMEOUT_S, within
from ke_ray.data.documents import check_text
from ke_ray.data.sources import split_part
from ke_ray.errors import DataError

__all__ = ["count_hub_shards", "describe_hub_dataset", "iter_hub_documents", "parse_hub_source"]

FIRST_DOCUMENT_TIMEOUT_S = 300.0


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """``hf:name[:config][:split]`` into name, config and split (``train`` when left out).

    With one part after the name it is the split, unless ``:`` follows it (``hf:name:config:``).

    Raises:
        DataError: no name, or too many parts.
    """
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"'{source}' is not of the form hf:NAME[:CONFIG][:SPLIT].")
    name, *rest = parts
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else ""
    return name, config or None, split or "train"


def describe_hub_dataset(source: str) -> dict[str, str]:
    """Name, config, split and commit of a Hub dataset: what changes when its content does."""
    base, column = split_part(source)
    name, config, split = parse_hub_source(base)
    described = {"url": base, "config": config or "", "split": split, "column": column or "text"}
    if Path(name).exists():
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {**described, "version": str(stats)}
    from huggingface_hub import HfApi

    info = within(
        START_TIMEOUT_S,
        lambda: HfApi().dataset_info(name, timeout=10),
        f"The dataset '{name}' cannot be looked up",
    )
    return {**described, "version": str(info.sha)}


def count_hub_shards(source: str) -> int:
    """How many files (shards) a streamed dataset is made of; each can be read by itself.

    Raises:
        DataError: as ``iter_hub_documents``.
    """
    base = split_part(source)[0]
    return within(
        FIRST_DOCUMENT_TIMEOUT_S,
        lambda: int(_stream(base).num_shards),
        f"'{base}' cannot be opened",
    )


def _stream(base: str) -> Any:
    from datasets import load_dataset

    name, config, split = parse_hub_source(base)
    return load_dataset(name, config, split=split, streaming=True)


def iter_hub_documents(
    source: str, shard: tuple[int, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield ``(text, where)`` from a dataset by name; ``where`` is the source and the row.

    Args:
        shard: number and count of shards, to read that one alone; None reads all.

    Raises:
        DataError: no such dataset, config, split or column; no network (said within 20 seconds);
            an empty or malformed document.
    """
    described = describe_hub_dataset(source)
    base, column = described["url"], described["column"]

    def start() -> tuple[Iterator[dict[str, Any]], dict[str, Any] | None]:
        stream = _stream(base)
        if shard is not None:
            stream = stream.shard(num_shards=shard[1], index=shard[0])
        rows = iter(stream)
        return rows, next(rows, None)

    rows, row = within(FIRST_DOCUMENT_TIMEOUT_S, start, f"'{base}' cannot be opened")
    if row is None:
        raise DataError(f"'{base}' holds no documents.")
    number = 0
    part = "" if shard is None else f", shard {shard[0]}"
    while row is not None:
        number += 1
        where = f"{base}{part}, row {number}"
        if column not in row:
            raise DataError(f"{where}: no column '{column}' (it has: {', '.join(row)}).")
        yield check_text(row[column], where, column), where
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(f"{where}: the stream broke after it: {error}.") from error
