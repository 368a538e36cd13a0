"""The text of a document source that a sample is drawn from, without a full pass over huge ones.

A source of up to a budget of stored bytes is read through. Of a larger one 256 windows are read,
each a 256th of the budget long and all at the same distance in stored bytes, whatever the number
of files:

    plain JSON lines   the documents that begin in the window
    Parquet            the rows at the same place among the file's rows
    .gz, .zst          entered at their beginning only: as much of it as the file's windows have
    hf:                up to 256 shards, evenly chosen, each from its beginning

Documents that begin in a window are taken whole: so every byte of a plain or Parquet source has
the same chance to be reached, however long its document is.

The budget is 64 MiB, or 24 bytes for each token wanted where that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

from ke_ray.data.documents import DOCUMENT_SUFFIXES, iter_documents, iter_file
from ke_ray.data.hub_dataset import count_hub_shards, iter_hub_documents
from ke_ray.data.sources import SourceFile, list_files, split_part

NUM_WINDOWS = 256
BUDGET_BYTES = 64 << 20
_BUDGET_PER_TOKEN = 24
_CONNECTIONS = 16

Documents = Callable[[], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class ReachedText:
    """Text to draw from.

    Attributes:
        documents: a fresh iterator of (neighbourhood, text), in the order of the source. Documents
            of one window are one neighbourhood where the source was read in windows, else each
            document is its own; the numbers ascend.
        num_bytes: UTF-8 bytes of all texts.
        note: what could not be reached, in words; None where everything could.
    """

    documents: Callable[[], Iterator[tuple[int, str]]]
    num_bytes: int
    note: str | None = None


def text_bytes(text: str) -> int:
    """The length of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def reach(source: str, num_tokens: int, offset: float) -> ReachedText:
    """Find the text of ``source`` from which instances of ``num_tokens`` in all are to be drawn.

    Args:
        offset: in [0, 1), where in each 256th of a large source its window begins.

    Raises:
        DataError: as ``iter_documents``.
    """
    budget = max(BUDGET_BYTES, _BUDGET_PER_TOKEN * num_tokens)
    if source.startswith("hf:"):
        return _reach_hub(source, budget, offset)
    base, column = split_part(source)
    files = list_files(base, DOCUMENT_SUFFIXES)
    sizes = [int(file.describe()["size"]) for file in files]
    while sum(sizes) > budget:
        windows_text = _read_windows(_file_windows(files, sizes, column, budget, offset))
        if windows_text.num_bytes >= _BUDGET_PER_TOKEN * num_tokens:
            closed = sum(size for f, size in zip(files, sizes, strict=True) if f.is_compressed)
            note = None
            if closed:
                note = (
                    f"The compressed files of '{source}' ({closed / 1e9:.3g} GB) were read from "
                    f"their beginnings only, about {100 * budget / sum(sizes):.2g} % of each."
                )
            return ReachedText(windows_text.documents, windows_text.num_bytes, note)
        budget *= 4  # documents longer than the distance of windows: few begin in one
    read = partial(iter_documents, source)
    return ReachedText(lambda: enumerate(text for text, _ in read()), sum(map(_size, read())))


def _file_windows(
    files: Sequence[SourceFile],
    sizes: Sequence[int],
    column: str | None,
    budget: int,
    offset: float,
) -> list[Documents]:
    """A reader for each window, in order; for the windows of a compressed file together, one."""
    total, length = sum(sizes), budget // NUM_WINDOWS
    windows: list[list[Documents]] = []
    from_beginning: dict[int, int] = {}  # compressed file → bytes of its windows
    number, start_of_file = 0, 0
    for window in range(NUM_WINDOWS):
        start = int((window + offset) * total / NUM_WINDOWS)
        stop = min(start + length, total)
        parts: list[Documents] = []
        while start_of_file + sizes[number] <= start:
            start_of_file += sizes[number]
            number += 1
        here, begins = number, start_of_file
        while here < len(files) and begins < stop:
            size = sizes[here]
            a, b = max(start - begins, 0), min(stop - begins, size)
            if files[here].is_compressed:
                if here not in from_beginning:
                    parts.append(partial(_beginning, files, here, column, from_beginning, size))
                from_beginning[here] = from_beginning.get(here, 0) + b - a
            elif b > a:
                parts.append(partial(iter_file, files[here], column, a / size, b / size))
            begins, here = begins + size, here + 1
        windows.append(parts)
    return [partial(_chained, parts) for parts in windows if parts]


def _chained(parts: Sequence[Documents]) -> Iterator[tuple[str, str]]:
    return chain.from_iterable(part() for part in parts)


def _beginning(
    files: Sequence[SourceFile],
    number: int,
    column: str | None,
    shares: dict[int, int],
    size: int,
) -> Iterator[tuple[str, str]]:
    return iter_file(files[number], column, 0.0, shares[number] / size)


def _reach_hub(source: str, budget: int, offset: float) -> ReachedText:
    num_shards = count_hub_shards(source)
    num_windows = min(num_shards, NUM_WINDOWS)
    limit, cut = budget // num_windows, []

    def window(number: int) -> Iterator[tuple[str, str]]:
        shard = int((number + offset) * num_shards / num_windows)
        left = limit
        documents = iter_hub_documents(source, (shard, num_shards))
        while left > 0 and (document := next(documents, None)):
            left -= text_bytes(document[0])
            yield document
        if left <= 0:
            cut.append(number)

    windows_text = _read_windows([partial(window, number) for number in range(num_windows)])
    note = None
    if cut or num_windows < num_shards:
        note = (
            f"'{source}' was read from the beginning of {num_windows} of its {num_shards} shards, "
            f"up to {limit / 1e6:.3g} MB of text each."
        )
    return ReachedText(windows_text.documents, windows_text.num_bytes, note)


def _read_windows(windows: Sequence[Documents]) -> ReachedText:
    """Read all windows, several at once, and keep their text."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        texts = list(pool.map(lambda window: [text for text, _ in window()], windows))
    flat = [(number, text) for number, window in enumerate(texts) for text in window]
    if len(windows) < NUM_WINDOWS // 2:  # too few to be told apart: each document by itself
        flat = [(number, text) for number, (_, text) in enumerate(flat)]
    return ReachedText(lambda: iter(flat), sum(text_bytes(text) for _, text in flat))


def _size(document: tuple[str, str]) -> int:
    return text_bytes(document[0])
