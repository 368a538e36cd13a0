"""Packing of a large corpus in pieces, by any number of processes, into files of full rows.

The stream of ``ke_ray.data.packing`` (documents in order, an end-of-text id after each, cut every T
tokens, the last part shorter than T dropped) is made in two rounds of independent tasks:

1. Each *piece* of the source, a part of a file, is tokenised into token files.
2. Row files of equal size are cut from the stream that the token files are when joined in order;
   where each of them lies in it follows from the counts of the first round alone.

Piece and row files appear whole or not at all, so a round that is killed goes on where it was. How
many processes there are changes no byte. A task holds one token or row file in memory.

::

    tokens/00003.json           of piece 3: tokens in each of its files, largest id; written last
    tokens/00003-0000.bin       ids, little-endian uint16 or uint32
    rows/00000.npy              [k, T]; a source of ready-made token ids (``ke_ray.data.token_ids``)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.data.documents import DOCUMENT_SUFFIXES, iter_documents, iter_file
from ke_ray.data.packing import document_batches, plain_tokenizer
from ke_ray.data.sources import list_files, split_part
from ke_ray.errors import DataError

TOKENS, ROWS = "tokens", "rows"
#: Stored bytes of a piece; a compressed file is one piece, as it can be read from its start only.
PIECE_BYTES = 32 << 20
#: A token file has so many ids and those of one batch more; a row file at most so many.
FILE_TOKENS = 1 << 23


@dataclass(frozen=True)
class Piece:
    """A part of a source: of a file, as fractions, or all of a Hub dataset."""

    number: int
    url: str
    column: str | None = None
    start: float = 0.0
    stop: float = 1.0

    def documents(self) -> Iterator[tuple[str, str]]:
        """Its documents in order, as ``iter_documents``."""
        if self.url.startswith("hf:"):
            return iter_documents(self.url)
        (file,) = list_files(self.url)
        return iter_file(file, self.column, self.start, self.stop)


@dataclass(frozen=True)
class RowFile:
    """Rows ``first_row`` up to ``stop_row`` of the stream."""

    number: int
    first_row: int
    stop_row: int

    @property
    def name(self) -> str:
        return f"{self.number:05}.npy"


def plan_pieces(source: str, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """The pieces of a source of documents, in its order; they depend on the source alone.

    Raises:
        DataError: nothing is there.
    """
    if source.startswith("hf:"):
        return [Piece(0, source)]
    pieces: list[Piece] = []
    base, column = split_part(source)
    for file in list_files(base, DOCUMENT_SUFFIXES):
        size = int(file.describe()["size"])
        count = 1 if file.is_compressed else max(1, -(-size // piece_bytes))
        for part in range(count):
            start, stop = part / count, (part + 1) / count
            pieces.append(Piece(len(pieces), file.url, column, start, stop))
    return pieces


def tokenise_piece(
    piece: Piece,
    folder: str,
    tokenizer: Tokenizer,
    eos_token_id: int,
    dtype: str,
    file_tokens: int = FILE_TOKENS,
) -> dict[str, Any]:
    """Write the token files of a piece, unless they are there.

    Returns:
        ``counts``: tokens in each file; ``largest_id``, -1 where there is none.

    Raises:
        DataError: a document is malformed; file and line or byte are named.
        StorageError: the folder cannot be written.
    """
    about = storage.join(folder, TOKENS, f"{piece.number:05}.json")
    if storage.exists(about):
        return storage.read_json(about)
    tokenizer = plain_tokenizer(tokenizer)
    counts: list[int] = []
    largest = -1
    waiting: list[NDArray[Any]] = []
    num_waiting = 0

    def write() -> None:
        nonlocal waiting, num_waiting
        name = f"{piece.number:05}-{len(counts):04}.bin"
        storage.write_atomic(storage.join(folder, TOKENS, name), np.concatenate(waiting).tobytes())
        counts.append(num_waiting)
        waiting, num_waiting = [], 0

    for texts in document_batches(piece.documents()):
        ids: list[int] = []
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += encoding.ids
            ids.append(eos_token_id)
        block = np.array(ids, np.uint32)
        largest = max(largest, int(block.max()))
        waiting.append(block.astype(f"<{np.dtype(dtype).str[1:]}"))
        num_waiting += len(block)
        if num_waiting >= file_tokens:
            write()
    if num_waiting:
        write()
    result = {"counts": counts, "largest_id": largest}
    storage.write_json(about, result)
    return result


def plan_rows(
    num_tokens: int, sequence_length: int, file_tokens: int = FILE_TOKENS
) -> list[RowFile]:
    """The row files of a stream of so many tokens."""
    num_rows, per_file = num_tokens // sequence_length, max(1, file_tokens // sequence_length)
    starts = range(0, num_rows, per_file)
    return [RowFile(n, first, min(first + per_file, num_rows)) for n, first in enumerate(starts)]


def write_row_file(
    rows: RowFile, folder: str, counts: Sequence[Sequence[int]], sequence_length: int, dtype: str
) -> None:
    """Cut a row file from the token files, unless it is there.

    Args:
        counts: of each piece, the tokens in each of its files.

    Raises:
        StorageError: a token file cannot be read, or the row file not written.
    """
    target = storage.join(folder, ROWS, rows.name)
    if storage.exists(target):
        return
    first, stop = rows.first_row * sequence_length, rows.stop_row * sequence_length
    ids = np.empty(stop - first, f"<{np.dtype(dtype).str[1:]}")
    begin = 0  # of a token file, in the stream
    for piece, of_files in enumerate(counts):
        for number, count in enumerate(of_files):
            start, end = max(first, begin), min(stop, begin + count)
            if start < end:
                path = storage.join(folder, TOKENS, f"{piece:05}-{number:04}.bin")
                tokens = np.frombuffer(storage.read_bytes(path), ids.dtype)
                if len(tokens) != count:
                    raise DataError(
                        f"'{path}' holds {len(tokens)} token ids, expected {count}; remove the "
                        f"folder '{folder}' and run the command again."
                    )
                ids[start - first : end - first] = tokens[start - begin : end - begin]
            begin += count
    data = io.BytesIO()
    np.save(data, ids.reshape(-1, sequence_length), allow_pickle=False)
    storage.write_atomic(target, data.getvalue())
