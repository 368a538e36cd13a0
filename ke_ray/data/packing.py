"""Packing of documents into instances of exactly T tokens, joined by an end-of-text id.

The stream is ids(d1) EOS ids(d2) EOS …, cut every T tokens; a last part shorter than T is dropped.
Special tokens are never added by the tokenizer; EOS comes from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray.errors import DataError

_BATCH_CHARACTERS = 1 << 20
_LEAST_CHARACTERS = 1 << 12
_BATCH_DOCUMENTS = 2048


class TokenBuffer:
    """A buffer of token ids from which full instances are taken.

    Args:
        sequence_length: T.
    """

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self._parts: list[NDArray[np.uint32]] = []
        self._held = 0

    def add(self, ids: list[int]) -> None:
        """Append the ids of one or more documents (with their EOS)."""
        self._parts.append(np.array(ids, dtype=np.uint32))
        self._held += len(ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in the buffer, at most T − 1 after ``take``."""
        return self._held

    def take(self) -> NDArray[np.uint32]:
        """All full instances, [k, T] (k may be 0); the rest stays."""
        count = self._held // self.sequence_length
        if not count:
            return np.empty((0, self.sequence_length), np.uint32)
        tokens = np.concatenate(self._parts)
        used = count * self.sequence_length
        self._parts, self._held = [tokens[used:].copy()], len(tokens) - used
        return tokens[:used].reshape(count, self.sequence_length)


def check_vocabulary(
    input_ids: NDArray[np.integer],
    lengths: NDArray[np.integer] | None,
    vocab_size: int | None,
    *,
    origin: str,
    first_instance: int = 0,
) -> None:
    """Every real token id is in ``[0, vocab_size)``.

    Args:
        input_ids: [n, T]; right padded.
        lengths: real tokens in each row, [n]; None when all are.
        vocab_size: None checks only that ids are not negative.
        first_instance: the number of row 0 in the corpus, for the message.

    Raises:
        DataError: naming instance and position of the first id at fault.
    """
    limit = vocab_size if vocab_size is not None else np.iinfo(np.int32).max
    if not input_ids.size or (input_ids.max() < limit and input_ids.min() >= 0):
        return
    wrong = (input_ids >= limit) | (input_ids < 0)
    if lengths is not None:
        wrong &= np.arange(input_ids.shape[1]) < np.asarray(lengths)[:, None]
    if not wrong.any():
        return
    row, position = (int(index) for index in np.argwhere(wrong)[0])
    raise DataError(
        f"{origin}: instance {first_instance + row}, position {position} holds token id "
        f"{int(input_ids[row, position])}, outside the model's vocabulary of {limit} entries; "
        "use the token ids or the tokenizer that belong to this model."
    )


def pack_documents(
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    eos_token_id: int,
    num_instances: int | None = None,
    vocab_size: int | None = None,
    origin: str = "the corpus",
    document_ends: list[int] | None = None,
) -> Iterator[NDArray[np.uint32]]:
    """Yield blocks of instances, [k, T] uint32, until ``num_instances`` are full.

    Documents are tokenised in batches of about 1 MiB, on all threads that ``tokenizers`` may use
    (``RAYON_NUM_THREADS``); memory is bounded by one batch.

    Args:
        documents: ``(text, where)``, read no further than the last instance needs (to a batch).
        num_instances: None packs all documents.
        vocab_size: of the model; None checks nothing.
        document_ends: where to append, for each document read, at which token of the stream it
            ends (its EOS included).

    Raises:
        DataError: EOS or a token id outside the vocabulary, T or N below 1, or fewer instances
            than requested (the message says how many there are).
    """
    check_request(num_instances, sequence_length, eos_token_id, vocab_size, origin)
    tokenizer = plain_tokenizer(tokenizer)
    buffer, made, num_tokens = TokenBuffer(sequence_length), 0, 0

    def characters_to_tokenise() -> int:
        return _characters_wanted(buffer, made, num_instances)

    for texts in document_batches(documents, characters_to_tokenise):
        ids: list[int] = []
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids += encoding.ids
            ids.append(eos_token_id)
            if document_ends is not None:
                document_ends.append(num_tokens + len(ids))
        num_tokens += len(ids)
        buffer.add(ids)
        block = buffer.take()
        if num_instances is not None:
            block = block[: num_instances - made]
        if len(block):
            check_vocabulary(block, None, vocab_size, origin=origin, first_instance=made)
            made += len(block)
            yield block
        if made == num_instances:
            return
    if num_instances is not None:
        raise DataError(
            f"{origin} holds {made} instances of {sequence_length} tokens, but {num_instances} "
            "were requested. Request fewer or shorter ones, or give more documents."
        )


def check_request(
    num_instances: int | None,
    sequence_length: int,
    eos_token_id: int,
    vocab_size: int | None,
    origin: str,
) -> None:
    """Raises DataError where N, T or the end-of-text id cannot be."""
    if sequence_length < 1 or (num_instances is not None and num_instances < 1):
        raise DataError(
            f"{origin}: {num_instances} instances of {sequence_length} tokens were requested; "
            "both must be at least 1."
        )
    if eos_token_id < 0 or (vocab_size is not None and eos_token_id >= vocab_size):
        raise DataError(
            f"{origin}: the end-of-text id {eos_token_id} is outside the model's vocabulary of "
            f"{vocab_size} entries; give the id from the model's config."
        )


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, without the truncation and padding that its file may ask for."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _characters_wanted(buffer: TokenBuffer, made: int, num_instances: int | None) -> int:
    """How much text to tokenise next: not much more than is still needed."""
    if num_instances is None:
        return _BATCH_CHARACTERS
    tokens = (num_instances - made) * buffer.sequence_length - buffer.num_tokens
    return min(max(2 * tokens, _LEAST_CHARACTERS), _BATCH_CHARACTERS)


def document_batches(
    documents: Iterable[tuple[str, str]],
    characters_wanted: Callable[[], int] = lambda: _BATCH_CHARACTERS,
) -> Iterator[list[str]]:
    """The texts of documents, in order, in lists of about so many characters."""
    texts: list[str] = []
    num_characters, limit = 0, characters_wanted()
    for text, _ in documents:
        texts.append(text)
        num_characters += len(text)
        if num_characters >= limit or len(texts) == _BATCH_DOCUMENTS:
            yield texts
            texts, num_characters, limit = [], 0, characters_wanted()
    if texts:
        yield texts
