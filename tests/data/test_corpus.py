"""Corpora from every kind of source, and fingerprints of what counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import save_file

from ke_ray.data.corpus import build_corpus, corpus_sha256, parse_data_option, source_kind
from ke_ray.data.tokenizer import load_tokenizer, train_bpe
from ke_ray.errors import DataError

TOKENIZER = train_bpe(["a stitch in time saves nine, and nine in time a stitch"] * 3, 280)
TEXTS = [f"a stitch in time saves {n}" for n in range(60)]


def write_documents(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_documents_become_a_corpus(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    corpus = build_corpus(
        "mine",
        source,
        num_instances=7,
        sequence_length=10,
        tokenizer=TOKENIZER,
        eos_token_id=0,
        vocab_size=280,
    )
    assert corpus.input_ids.shape == (7, 10)
    assert corpus.input_ids.dtype == corpus.lengths.dtype == np.int32
    assert (corpus.name, corpus.source, corpus.num_tokens) == ("mine", source, 70)
    assert (corpus.eos_token_id, corpus.instance_ids) == (0, None)
    first = TOKENIZER.encode(TEXTS[0]).ids
    assert corpus.input_ids.ravel()[: len(first) + 1].tolist() == [*first, 0]


def test_the_end_of_text_id_is_the_callers(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    options = {"num_instances": 5, "sequence_length": 30, "tokenizer": TOKENIZER}
    zero = build_corpus("a", source, eos_token_id=0, **options)
    other = build_corpus("a", source, eos_token_id=279, **options)
    assert np.array_equal(zero.input_ids == 0, other.input_ids == 279)
    assert zero.sha256 != other.sha256
    with pytest.raises(DataError, match="--eos-token-id"):
        build_corpus("a", source, eos_token_id=None, **options)


def test_the_published_tokenizers_differ_in_what_50279_means(reference_data: Path) -> None:
    """The trap: a lookup of <|endoftext|> by name would give 0 in one file, 50279 in the other."""
    folder = reference_data / "data" / "tokenizer"
    native = load_tokenizer(folder / "olmo_tokenizer.json")
    hf = load_tokenizer(folder / "olmo_hf_tokenizer.json")
    assert native.token_to_id("<|endoftext|>") == 0
    assert hf.token_to_id("<|endoftext|>") == 50279
    options = {"num_instances": 20, "sequence_length": 256, "eos_token_id": 50279}
    source = str(reference_data / "data" / "c4_sample")
    a = build_corpus("c4", source, tokenizer=native, **options)
    b = build_corpus("c4", source, tokenizer=hf, **options)
    assert (a.input_ids == 50279).any()
    assert a.sha256 == b.sha256


def test_the_goldens_inputs_are_read_as_they_are(reference_data: Path) -> None:
    from safetensors.numpy import load_file

    path = reference_data / "golden" / "tiny-seed0" / "inputs.safetensors"
    tensors = load_file(path)
    plain = build_corpus("g", str(path), num_instances=16, sequence_length=128, vocab_size=2048)
    assert np.array_equal(plain.input_ids, tensors["input_ids"])
    padded = build_corpus(
        "g",
        f"{path}#padded_input_ids,padded_attention_mask",
        num_instances=None,
        sequence_length=None,
    )
    assert padded.lengths.tolist() == tensors["padded_attention_mask"].sum(1).tolist()
    assert padded.lengths[0] == 128
    assert padded.lengths[5] == 1


def test_the_fingerprint_ignores_padding_and_nothing_else(tmp_path: Path) -> None:
    ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    variants = {
        "right": (ids, mask),
        "other_id": (np.where(mask == 1, ids, 77), mask),
        "left": (np.array([[3, 5, 6, 7], [3, 3, 8, 9]]), mask[:, ::-1]),
        "holes": (np.array([[5, 1, 6, 7], [1, 8, 1, 9]]), np.array([[1, 0, 1, 1], [0, 1, 0, 1]])),
        "wider": (np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3)))),
    }
    hashes = set()
    for name, (tokens, real) in variants.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({"input_ids": tokens.copy(), "attention_mask": np.ascontiguousarray(real)}, path)
        hashes.add(build_corpus(name, str(path), num_instances=2, sequence_length=None).sha256)
    assert len(hashes) == 1
    lengths = np.array([3, 2])
    for changed in (
        corpus_sha256(np.array([[5, 6, 7, 0], [8, 1, 0, 0]]), lengths),
        corpus_sha256(ids[::-1], lengths[::-1]),
        corpus_sha256(ids[:1], lengths[:1]),
        corpus_sha256(ids, np.array([3, 3])),
        corpus_sha256(np.array([[5, 6, 0], [7, 8, 9]]), np.array([2, 3])),
    ):
        assert changed not in hashes


def test_what_a_source_holds_is_seen_from_the_source(tmp_path: Path) -> None:
    write_documents(tmp_path / "a.jsonl")
    np.save(tmp_path / "a.npy", np.ones((2, 3), int))
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "text.parquet")
    parquet.write_table(
        pyarrow.table({"input_ids": [[1]], "text": ["x"]}), tmp_path / "ids.parquet"
    )
    assert source_kind(str(tmp_path / "a.jsonl")) == "documents"
    assert source_kind("hf:org/name") == "documents"
    assert source_kind(str(tmp_path / "a.npy")) == "token_ids"
    assert source_kind(str(tmp_path / "text.parquet")) == "documents"
    assert source_kind(str(tmp_path / "ids.parquet")) == "token_ids"
    assert source_kind(f"{tmp_path}/ids.parquet#text") == "documents"
    assert source_kind(str(tmp_path / "order.yaml")) == "olmo"
    with pytest.raises(DataError, match="mixes"):
        source_kind(str(tmp_path))


def test_documents_without_a_tokenizer_or_length_are_refused(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="need a tokenizer"):
        build_corpus("a", source, num_instances=1, sequence_length=4)
    with pytest.raises(DataError, match="give a sequence length"):
        build_corpus(
            "a",
            source,
            num_instances=1,
            sequence_length=None,
            tokenizer=TOKENIZER,
            eos_token_id=0,
        )
    with pytest.raises(DataError, match="fewer than the .* tokens of one instance"):
        build_corpus(
            "a",
            source,
            num_instances=None,
            sequence_length=100_000,
            tokenizer=TOKENIZER,
            eos_token_id=0,
        )


@pytest.mark.parametrize(
    ("option", "name", "source"),
    [
        ("c4=/data/c4", "c4", "/data/c4"),
        ("/data/dolma-0001.jsonl.gz", "dolma-0001", "/data/dolma-0001.jsonl.gz"),
        ("/data/dolma/", "dolma", "/data/dolma/"),
        ("a=s3://b/c?d=e", "a", "s3://b/c?d=e"),
        ("s3://b/c.parquet?d=e", "c", "s3://b/c.parquet?d=e"),
        ("/a=b/c.jsonl", "c", "/a=b/c.jsonl"),
        ("x=hf:allenai/c4:en:train", "x", "hf:allenai/c4:en:train"),
        ("f.safetensors#ids,mask", "f", "f.safetensors#ids,mask"),
        ("..", "data", ".."),
    ],
)
def test_data_options(option: str, name: str, source: str) -> None:
    assert parse_data_option(option) == (name, source)


@pytest.mark.parametrize(
    "option", ["", "=x", "a=", "a b=x", "é=x", "a@b=x", ".a=x", "n" * 81 + "=x"]
)
def test_wrong_data_options(option: str) -> None:
    with pytest.raises(DataError):
        parse_data_option(option)
