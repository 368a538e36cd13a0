"""Packing against a loop from the definition: ids, EOS, cut every T."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ke_ray.data.packing import check_vocabulary, pack_documents
from ke_ray.data.tokenizer import train_bpe
from ke_ray.errors import DataError

EOS = 7
TOKENIZER = train_bpe(["the cat sat on the mat, and the dog sat on the log"] * 3, 280)


def packed_by_loop(texts: list[str], sequence_length: int) -> list[list[int]]:
    stream: list[int] = []
    for text in texts:
        stream.extend(TOKENIZER.encode(text, add_special_tokens=False).ids)
        stream.append(EOS)
    count = len(stream) // sequence_length
    return [stream[i * sequence_length : (i + 1) * sequence_length] for i in range(count)]


def pack(texts: list[str], sequence_length: int, **options: object) -> np.ndarray:
    blocks = list(
        pack_documents(
            ((text, "here") for text in texts),
            TOKENIZER,
            sequence_length=sequence_length,
            eos_token_id=EOS,
            **options,
        )
    )
    return np.concatenate(blocks) if blocks else np.empty((0, sequence_length))


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=40),
    sequence_length=st.integers(1, 50),
)
def test_instances_are_the_stream_cut_every_t_tokens(
    texts: list[str], sequence_length: int
) -> None:
    expected = packed_by_loop(texts, sequence_length)
    assert pack(texts, sequence_length).tolist() == expected
    for count in {1, len(expected)} - {0}:
        if count <= len(expected):
            assert pack(texts, sequence_length, num_instances=count).tolist() == expected[:count]


def test_batches_of_tokenisation_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"the cat sat on mat {n}" for n in range(200)]
    whole = pack(texts, 16)
    monkeypatch.setattr("ke_ray.data.packing._BATCH_CHARACTERS", 50)
    monkeypatch.setattr("ke_ray.data.packing._LEAST_CHARACTERS", 1)
    assert np.array_equal(pack(texts, 16), whole)


def test_no_document_is_read_beyond_what_is_needed() -> None:
    read = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield "the cat sat on the mat, and the dog sat on the log", "here"

    blocks = pack_documents(
        endless(), TOKENIZER, sequence_length=8, eos_token_id=EOS, num_instances=10
    )
    assert sum(len(block) for block in blocks) == 10
    assert read < 200  # 80 tokens are needed; the least batch has 4,096 characters


def test_too_few_documents_say_how_many_instances_there_are() -> None:
    texts = ["the cat sat on the mat"] * 10
    held = len(packed_by_loop(texts, 12))
    with pytest.raises(DataError, match=rf"holds {held} instances.*999.*fewer or shorter"):
        pack(texts, 12, num_instances=999)


def test_ids_beyond_the_vocabulary_name_instance_and_position() -> None:
    texts = ["the cat sat on the mat and the dog"] * 20
    expected = np.array(packed_by_loop(texts, 5))
    limit = int(expected.max())
    row, position = np.argwhere(expected == limit)[0]
    with pytest.raises(DataError, match=rf"instance {row}, position {position} holds token id"):
        pack(texts, 5, vocab_size=limit)
    assert len(pack(texts, 5, vocab_size=limit + 1)) == len(expected)
    with pytest.raises(DataError, match="end-of-text id 7 is outside"):
        pack(texts, 5, vocab_size=7)


@pytest.mark.parametrize(("count", "length"), [(0, 5), (-1, 5), (1, 0)])
def test_sizes_below_one_are_refused(count: int, length: int) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        pack(["a"], length, num_instances=count)


def test_a_truncating_tokenizer_does_not_shorten_documents() -> None:
    cutting = Tokenizer.from_str(TOKENIZER.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=9)
    documents = [("the cat sat on the mat", "here")]
    options = {"sequence_length": 4, "eos_token_id": EOS}
    plain = list(pack_documents(documents, TOKENIZER, **options))
    cut = list(pack_documents(documents, cutting, **options))
    assert np.array_equal(np.concatenate(plain), np.concatenate(cut))
    assert cutting.truncation is not None  # the caller's tokenizer is left as it was


def test_padding_is_not_checked_against_the_vocabulary() -> None:
    ids = np.array([[1, 2, 999], [3, -1, -1]])
    check_vocabulary(ids, np.array([2, 1]), 10, origin="x")
    with pytest.raises(DataError, match="instance 4, position 2 holds token id 999"):
        check_vocabulary(ids, np.array([3, 1]), 10, origin="x", first_instance=4)
    with pytest.raises(DataError, match="holds token id -1"):
        check_vocabulary(ids, np.array([2, 2]), None, origin="x")
