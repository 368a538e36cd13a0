"""N instances of T tokens spread over a whole source of documents.

The packed stream of the text reached (``ke_ray.data.reach``), ids(d1) EOS ids(d2) EOS …, is cut
into N equal slots, and each slot gives one instance: T tokens that begin at a place drawn for that
slot from a seed, such that the instance fits into its slot. So no token is used twice, and where
N · T is all there is, all of it is used. (The same place in every slot would fall in step with
documents of one length, and meet all of them at their beginnings, say.) An instance begins inside a
document as often as the length of documents has it, and runs on through EOS into the next.

Where the text is at least 16 bytes for each token wanted, slots are measured in bytes of text and
only documents that an instance meets are tokenised: an instance begins at token ⌊f · n⌋ of a
document of n tokens (EOS included) where its slot's place is at the fraction f of the text. With
less text (or tokens so long that an instance would outgrow its slot) all of it is tokenised and
slots are measured in tokens.

Batch sizes, workers and threads of the tokenizer have no part in any of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray.data.packing import check_request, check_vocabulary, plain_tokenizer
from ke_ray.data.reach import ReachedText, reach, text_bytes
from ke_ray.errors import DataError

_BYTES_PER_TOKEN = 16
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class SpreadInstances:
    """Instances and where they come from.

    Attributes:
        input_ids: [N, T] int32, in the order of the source.
        first, middle, last: [N] int64, the neighbourhood (``ReachedText.documents``) of the token
            at the beginning, in the middle and at the end of each instance.
        note: what of the source could not be reached; None where nothing is left out.
    """

    input_ids: NDArray[np.int32]
    first: NDArray[np.int64]
    middle: NDArray[np.int64]
    last: NDArray[np.int64]
    note: str | None = None


def spread_instances(
    source: str,
    tokenizer: Tokenizer,
    *,
    num_instances: int,
    sequence_length: int,
    eos_token_id: int,
    vocab_size: int | None = None,
    seed: int = 0,
) -> SpreadInstances:
    """Draw instances spread over ``source`` (module docstring).

    Args:
        seed: of the place of windows and instances; another seed draws other text.

    Raises:
        DataError: the source holds fewer tokens than N · T (the message says how many instances
            there are), and whatever ``iter_documents`` and ``pack_documents`` refuse.
    """
    origin = f"'{source}'"
    check_request(num_instances, sequence_length, eos_token_id, vocab_size, origin)
    tokenizer = plain_tokenizer(tokenizer)
    generator = np.random.Generator(np.random.PCG64(seed))
    offset, fractions = generator.random(), generator.random(num_instances)
    text_source = reach(source, num_instances * sequence_length, offset)
    sample = None
    if text_source.num_bytes >= _BYTES_PER_TOKEN * num_instances * sequence_length:
        sample = _by_bytes(
            text_source, tokenizer, num_instances, sequence_length, eos_token_id, fractions
        )
    if sample is None:
        sample = _by_tokens(
            text_source, tokenizer, num_instances, sequence_length, eos_token_id, fractions, origin
        )
    check_vocabulary(sample.input_ids, None, vocab_size, origin=origin)
    return sample


def slot_starts(
    total: int, num_instances: int, room: int, fractions: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Where instances begin: in each slot at a fraction of the places that leave ``room`` in it.

    Args:
        fractions: [N] in [0, 1).
    """
    bounds = np.arange(num_instances + 1, dtype=np.int64) * total // num_instances
    return bounds[:-1] + (fractions * (np.diff(bounds) - room + 1)).astype(np.int64)


def _by_bytes(
    text_source: ReachedText,
    tokenizer: Tokenizer,
    num_instances: int,
    sequence_length: int,
    eos_token_id: int,
    fractions: NDArray[np.float64],
) -> SpreadInstances | None:
    """None where an instance would outgrow its slot."""
    room = _BYTES_PER_TOKEN * sequence_length
    starts = slot_starts(text_source.num_bytes, num_instances, room, fractions)
    input_ids = np.zeros((num_instances, sequence_length), np.int32)
    units = np.zeros((3, num_instances), np.int64)
    row, filled, begin = 0, -1, 0  # filled −1: instance ``row`` has not begun
    for unit, text in text_source.documents():
        end = begin + text_bytes(text)
        if filled < 0 and starts[row] >= end:
            begin = end
            continue
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, eos_token_id]
        used = 0
        while filled >= 0 or starts[row] < end:
            if filled < 0:
                first = (starts[row] - begin) * len(ids) // (end - begin)
                if first < used:
                    return None
                used, filled = first, 0
                units[0, row] = unit
            taken = ids[used : used + sequence_length - filled]
            input_ids[row, filled : filled + len(taken)] = taken
            if filled <= sequence_length // 2 < filled + len(taken):
                units[1, row] = unit
            filled += len(taken)
            used += len(taken)
            if filled < sequence_length:
                if row + 1 < num_instances and starts[row + 1] < end:
                    return None
                break
            units[2, row] = unit
            row, filled = row + 1, -1
            if row == num_instances:
                return SpreadInstances(input_ids, units[0], units[1], units[2], text_source.note)
        begin = end
    return None


def _by_tokens(
    text_source: ReachedText,
    tokenizer: Tokenizer,
    num_instances: int,
    sequence_length: int,
    eos_token_id: int,
    fractions: NDArray[np.float64],
    origin: str,
) -> SpreadInstances:
    parts: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    units: list[int] = []
    for batch in _batches(text_source.documents()):
        units += [unit for unit, _ in batch]
        texts = [text for _, text in batch]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, eos_token_id], np.int32))
            lengths.append(len(parts[-1]))
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    if len(stream) < num_instances * sequence_length:
        raise DataError(
            f"{origin} holds {len(stream) // sequence_length} instances of {sequence_length} "
            f"tokens, but {num_instances} were requested. Request fewer or shorter ones, or give "
            "more documents."
        )
    starts = slot_starts(len(stream), num_instances, sequence_length, fractions)
    input_ids = stream[starts[:, None] + np.arange(sequence_length)]
    ends = np.cumsum(lengths)

    def unit_at(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array(units, np.int64)[np.searchsorted(ends, positions, side="right")]

    return SpreadInstances(
        input_ids,
        unit_at(starts),
        unit_at(starts + sequence_length // 2),
        unit_at(starts + sequence_length - 1),
        text_source.note,
    )


def _batches(documents: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= 1 << 20 or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
