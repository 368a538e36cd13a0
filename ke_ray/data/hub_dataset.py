"""Documents of a dataset on the Hugging Face Hub, streamed: ``hf:name[:config][:split]``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ke_ray.data.deadline import START_TIMEOUT_S, within
from ke_ray.data.document import check_text
from ke_ray.data.sources import split_part
from ke_ray.errors import DataError

FIRST_DOCUMENT_TIMEOUT_S = 300.0

#: Dolma is the corpus of this field, and a script: refused before anything is asked of the network.
_DOLMA = "allenai/dolma"
_DOLMA_FILE = "https://olmo-data.org/dolma-v1_6-8B-sample/v1_5r2_sample-0000.json.gz"


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """``hf:name[:config][:split]`` into name, config and split (``train`` when left out).

    With one part after the name it is the split, unless ``:`` follows it (``hf:name:config:``).

    Raises:
        DataError: no name, too many parts, or a data set that is known to be a script.
    """
    if source.startswith("hf://"):
        raise DataError(
            f"'{source}' is a path, and data sets of the Hub are written hf:NAME[:CONFIG][:SPLIT], "
            "for example hf:allenai/c4:en:train. Give single files by their https URL."
        )
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"'{source}' is not of the form hf:NAME[:CONFIG][:SPLIT].")
    name, *rest = parts
    if name == _DOLMA:
        raise DataError(
            f"'{source}': the data set {_DOLMA} is a script (dolma.py) that downloads its "
            "documents, and datasets runs no scripts since version 4. Give one of the files that "
            f"it downloads (urls/v1_6-sample.txt there lists them), for example {_DOLMA_FILE}"
        )
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else ""
    return name, config or None, split or "train"


def check_hub_source(source: str) -> None:
    """Refuse a ``hf:`` source that can never work, without a network; others pass.

    Raises:
        DataError: not of the form, or known to be a script.
    """
    if source.startswith("hf:"):
        parse_hub_source(split_part(source)[0])


def describe_hub_dataset(source: str) -> dict[str, str]:
    """Name, config, split and commit of a Hub dataset: what changes when its content does.

    Raises:
        DataError: no such dataset, no network, or it is a program that datasets no longer runs.
    """
    base, column = split_part(source)
    name, config, split = parse_hub_source(base)
    description = {"url": base, "config": config or "", "split": split, "column": column or "text"}
    script = f"{name.rstrip('/').rsplit('/', 1)[-1]}.py"
    if Path(name).exists():
        _refuse_script(name, script, [path.name for path in Path(name).glob("*.py")])
        files = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {**description, "version": str(stats)}
    from huggingface_hub import HfApi

    info = within(
        START_TIMEOUT_S,
        lambda: HfApi().dataset_info(name, timeout=10),
        f"The dataset '{name}' cannot be looked up",
    )
    _refuse_script(name, script, [file.rfilename for file in info.siblings or ()])
    return {**description, "version": str(info.sha)}


def _refuse_script(name: str, script: str, files: list[str]) -> None:
    """Raise DataError where ``files`` hold the program that makes the data set."""
    if script not in files:
        return
    listed = next((file for file in files if file.startswith("urls/")), None)
    hint = f" ('{listed}' lists them)" if listed else ""
    raise DataError(
        f"The data set '{name}' is a script ({script}) that downloads its documents, and datasets "
        f"runs no scripts since version 4. Give the files that the script downloads{hint} by "
        "their https URL or as local files, or a data set that is stored as files, for example "
        "hf:allenai/c4:en:train."
    )


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
    """Yield ``(text, where)`` from a dataset by name; ``origin`` is the source and the row.

    Args:
        shard: number and count of shards, to read that one alone; None reads all.

    Raises:
        DataError: no such dataset, config, split or column; no network (raised within 20 seconds);
            an empty or malformed document.
    """
    description = describe_hub_dataset(source)
    base, column = description["url"], description["column"]

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
        origin = f"{base}{part}, row {number}"
        if column not in row:
            raise DataError(f"{origin}: no column '{column}' (it has: {', '.join(row)}).")
        yield check_text(row[column], origin, column), origin
        try:
            row = next(rows, None)
        except Exception as error:
            raise DataError(f"{origin}: the stream broke after it: {error}.") from error
