"""The cache of training sets: the fingerprint that names a packed file, and how it is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.data.corpus import source_kind
from ke_ray.data.documents import DOCUMENT_SUFFIXES, iter_documents
from ke_ray.data.hub_dataset import describe_hub_dataset
from ke_ray.data.olmo_order import iter_instances, read_olmo_source
from ke_ray.data.packing import pack_documents
from ke_ray.data.sources import list_files, split_part
from ke_ray.data.token_ids import iter_token_ids
from ke_ray.data.tokenizer import tokenizer_sha256
from ke_ray.errors import DataError

FORMAT_VERSION = 1


def source_fingerprint(
    source: str,
    *,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    eos_token_id: int | None,
    max_instances: int | None,
) -> str:
    """Hex sha256 of everything that decides the packed tokens.

    Files count with name, size and version or modification time, Hub datasets with their commit.
    """
    kind = source_kind(source)
    description: list[Any]
    if source.startswith("hf:"):
        description = [describe_hub_dataset(source)]
    elif kind == "olmo":
        olmo = read_olmo_source(source)
        paths = [*olmo.parts, *([olmo.order] if olmo.order else [])]
        description = [repr(olmo), [f.describe() for path in paths for f in list_files(path)]]
    else:
        base, part = split_part(source)
        suffixes = DOCUMENT_SUFFIXES if kind == "documents" else None
        description = [part, [file.describe() for file in list_files(base, suffixes)]]
    identity = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "source": description,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer_sha256(tokenizer) if tokenizer is not None else None,
        "eos_token_id": eos_token_id,
        "max_instances": max_instances,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _blocks(
    source: str,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    eos_token_id: int | None,
    vocab_size: int | None,
    max_instances: int | None,
) -> tuple[str, Iterator[NDArray[np.integer]]]:
    """The type in which ids are stored, and blocks of full instances, [k, T]."""
    kind = source_kind(source)
    if kind == "documents":
        if tokenizer is None or eos_token_id is None:
            raise DataError(
                f"'{source}' holds documents, which need a tokenizer and an end-of-text id."
            )
        num_ids = vocab_size
        if vocab_size is None or id_type(vocab_size) != "uint16":
            # Takes 30 ms for 50,000 entries, so not where the vocabulary is small anyway.
            num_ids = 1 + max(eos_token_id, *tokenizer.get_vocab(with_added_tokens=True).values())
        documents = pack_documents(
            iter_documents(source),
            tokenizer,
            sequence_length=sequence_length,
            eos_token_id=eos_token_id,
            vocab_size=vocab_size,
            origin=f"'{source}'",
        )
        return id_type(num_ids), documents
    if kind == "olmo":
        blocks = iter_instances(
            read_olmo_source(source), num_instances=max_instances, sequence_length=sequence_length
        )
        return "uint16", (ids for ids, _ in blocks)
    return id_type(vocab_size), _full_rows(source, sequence_length, vocab_size)


def id_type(num_ids: int | None) -> str:
    """The smaller of two types that holds ids below ``num_ids``."""
    return "uint16" if num_ids is not None and num_ids <= 1 << 16 else "uint32"


def _full_rows(
    source: str, sequence_length: int, vocab_size: int | None
) -> Iterator[NDArray[np.integer]]:
    count = 0
    for ids, lengths in iter_token_ids(source, num_instances=None, vocab_size=vocab_size):
        short = np.flatnonzero(lengths < sequence_length)
        if len(short):
            raise DataError(
                f"'{source}': instance {count + int(short[0])} has {int(lengths[short[0]])} real "
                f"tokens; training has no padding and needs {sequence_length} in each row."
            )
        count += len(ids)
        yield ids[:, :sequence_length]


def pack_to_file(
    source: str,
    target: Path,
    *,
    sequence_length: int,
    tokenizer: Tokenizer | None,
    eos_token_id: int | None,
    vocab_size: int | None,
    max_instances: int | None,
) -> dict[str, Any]:
    """Stream packed instances to ``target``, which appears whole or not at all.

    The caller holds the lock of ``target``.

    Returns:
        ``num_instances``, ``dtype`` (``uint16`` or ``uint32``), ``sha256`` of the ids as
        little-endian int32, and ``largest_id`` (-1 when there is none).

    Raises:
        DataError: see ``prepare_training_set``.
        OSError: no space or no permission.
    """
    dtype, blocks = _blocks(
        source, sequence_length, tokenizer, eos_token_id, vocab_size, max_instances
    )
    storage.remove_leftovers(target)
    temporary = storage.temporary_path(target)
    digest, count, largest_id = hashlib.sha256(), 0, -1
    try:
        with temporary.open("xb") as file:
            storage.hold(file.fileno())
            for block in blocks:
                block = block[: None if max_instances is None else max_instances - count]
                if not len(block):
                    break
                file.write(block.astype(dtype).tobytes())
                digest.update(block.astype("<i4").tobytes())
                count, largest_id = count + len(block), max(largest_id, int(block.max()))
            file.flush()
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return {
        "num_instances": count,
        "dtype": dtype,
        "sha256": digest.hexdigest(),
        "largest_id": largest_id,
    }
