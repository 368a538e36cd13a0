"""Instances spread over a source, and groups of them that share no document."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from ke_ray.core.jackknife import group_sizes, standard_error
from ke_ray.data import reach as reach_module
from ke_ray.data.corpus import Corpus, build_corpus
from ke_ray.data.packing import pack_documents
from ke_ray.data.sampling import spread_instances
from ke_ray.data.tokenizer import load_tokenizer, train_bpe
from ke_ray.errors import DataError

EOS = 0
TOKENIZER = train_bpe(["0123456789 " * 3] * 3, 270)  # a token for each byte, or nearly


def texts(number: int, *, words: int = 40, seed: int = 0) -> list[str]:
    """Documents of different lengths, each word with the number of its document."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, words, number)
    return [" ".join(f"{n}.{word}" for word in range(length)) for n, length in enumerate(lengths)]


def write_jsonl(path: Path, documents: Sequence[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return str(path)


def stream(documents: Sequence[str]) -> np.ndarray:
    """The packed stream, ids(d1) EOS ids(d2) EOS …"""
    (ids,) = pack_documents(
        [(text, "") for text in documents],
        TOKENIZER,
        sequence_length=1,
        eos_token_id=EOS,
    )
    return ids.ravel()


def places(corpus_ids: np.ndarray, packed: np.ndarray) -> list[int]:
    """Where each instance stands in the packed stream, which has it nowhere else."""
    found, length = [], corpus_ids.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(packed, length)
    for row in corpus_ids:
        (place,) = np.flatnonzero((windows == row).all(axis=1))
        found.append(int(place))
    return found


def draw(source: str, count: int, length: int, sampling: str = "spread", seed: int = 0) -> Corpus:
    return build_corpus(
        "mine",
        source,
        num_instances=count,
        sequence_length=length,
        tokenizer=TOKENIZER,
        eos_token_id=EOS,
        sampling=sampling,
        seed=seed,
    )


@pytest.mark.parametrize("count", [7, 64, 200])  # sparse by bytes, and by tokens
def test_instances_are_stretches_of_the_packed_stream_all_over_it(
    tmp_path: Path, count: int
) -> None:
    documents, length = texts(500), 24
    packed = stream(documents)
    corpus = draw(write_jsonl(tmp_path / "a.jsonl", documents), count, length)
    starts = np.array(places(corpus.input_ids, packed))
    slot = len(packed) / count
    assert (np.diff(starts) >= length).all()  # in order, and no token is used twice
    assert starts[0] < slot
    assert starts[-1] > len(packed) - slot - length
    middles = slot * (np.arange(count) + 0.5) - length / 2
    np.testing.assert_allclose(starts, middles, atol=0.5 * slot + 64)


def test_text_is_met_by_its_share_of_the_source_and_not_at_its_beginning(tmp_path: Path) -> None:
    long = " ".join(f"long.{word}" for word in range(1500))
    documents = texts(201)
    documents[100] = long
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    packed = stream(documents)
    share = len(TOKENIZER.encode(long).ids) / len(packed)
    begin = len(stream(documents[:100]))
    met, inside = [], []
    for seed in range(40):
        starts = np.array(places(draw(source, 6, 16, seed=seed).input_ids, packed))
        of_long = starts[(starts >= begin) & (starts < begin + share * len(packed))]
        met.append(len(of_long) / 6)
        inside += ((of_long - begin) / (share * len(packed))).tolist()
    assert np.mean(met) == pytest.approx(share, abs=0.05)
    assert np.mean(inside) == pytest.approx(0.5, abs=0.1)


def test_documents_of_one_length_are_met_at_all_their_places(tmp_path: Path) -> None:
    """Every slot is four documents long: one place for all slots met all documents at one place."""
    words = range(12)
    documents = [" ".join(f"{number:03d}.{word:02d}" for word in words) for number in range(256)]
    source = write_jsonl(tmp_path / "d.jsonl", documents)
    drawn = spread_instances(
        source, TOKENIZER, num_instances=64, sequence_length=16, eos_token_id=EOS
    )
    first_words = {TOKENIZER.decode(row).partition(".")[2][:2] for row in drawn.input_ids.tolist()}
    assert len(first_words) == len(words)


def test_where_all_text_is_needed_all_is_used_as_first_has_it(tmp_path: Path) -> None:
    documents = texts(60)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    count = len(stream(documents)) // 16
    spread, first = draw(source, count, 16), draw(source, count, 16, "first")
    shifts = np.array(places(spread.input_ids, stream(documents))) - np.arange(count) * 16
    assert shifts.min() >= 0
    assert shifts.max() < 16
    assert first.input_ids.ravel().tolist() == stream(documents)[: count * 16].tolist()
    with pytest.raises(DataError, match=f"{count} instances of 16 tokens, but {count + 1} were"):
        draw(source, count + 1, 16)


def test_the_same_bytes_whatever_the_format_and_the_files(tmp_path: Path) -> None:
    documents = texts(300)
    whole = draw(write_jsonl(tmp_path / "a.jsonl", documents), 32, 24)
    packed_gz = draw(write_jsonl(tmp_path / "a.jsonl.gz", documents), 32, 24)
    table = pyarrow.table({"text": documents})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=37)
    for start in range(0, 300, 100):
        write_jsonl(tmp_path / "many" / f"{start:03}.jsonl", documents[start : start + 100])
    others = [
        packed_gz,
        draw(str(tmp_path / "a.parquet"), 32, 24),
        draw(str(tmp_path / "many"), 32, 24),
    ]
    assert {other.sha256 for other in others} == {whole.sha256}
    assert {other.group_sizes for other in others} == {whole.group_sizes}
    assert draw(str(tmp_path / "a.jsonl"), 32, 24, seed=1).sha256 != whole.sha256


def test_first_takes_the_beginning_in_equal_groups(tmp_path: Path) -> None:
    documents = texts(500)
    corpus = draw(write_jsonl(tmp_path / "a.jsonl", documents), 100, 24, "first")
    assert corpus.input_ids.ravel().tolist() == stream(documents)[:2400].tolist()
    assert corpus.sampling == "first"
    assert corpus.group_sizes == tuple(group_sizes(100).tolist())


def test_first_gives_the_bytes_that_earlier_versions_gave(reference_data: Path) -> None:
    corpus = build_corpus(
        "c4",
        str(reference_data / "data" / "c4_sample"),
        num_instances=20,
        sequence_length=256,
        tokenizer=load_tokenizer(reference_data / "data" / "tokenizer" / "olmo_hf_tokenizer.json"),
        eos_token_id=50279,
        sampling="first",
    )
    assert corpus.sha256 == "0d2b842dd9a0beef3da47a7ae54d1fc2dd001a6c83d7974fbaea938326980de9"


@pytest.mark.parametrize(("words", "count"), [(40, 128), (400, 256), (2000, 100)])
def test_groups_share_no_document_or_the_factor_says_what_it_costs(
    tmp_path: Path, words: int, count: int
) -> None:
    documents = texts(40 * 500 // words if words > 400 else 400, words=words)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    drawn = spread_instances(
        source, TOKENIZER, num_instances=count, sequence_length=16, eos_token_id=EOS
    )
    corpus = draw(source, count, 16)
    bounds = np.cumsum(corpus.group_sizes)[:-1]
    shared = drawn.first[bounds] <= drawn.last[bounds - 1]
    assert corpus.stderr_factor is not None
    if words <= 400:
        assert not shared.any()
        assert corpus.stderr_factor == 1.0
    else:  # ten documents, 64 groups
        assert shared.any()
        assert len(corpus.group_sizes) == 64
        assert corpus.stderr_factor > 2


def test_a_huge_source_is_read_in_windows_all_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(20_000)
    size = sum(map(len, documents))
    monkeypatch.setattr(reach_module, "BUDGET_BYTES", size // 4)
    table = pyarrow.table({"text": documents})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=999, compression="none")
    for start in range(0, 20_000, 2500):
        write_jsonl(tmp_path / "many" / f"{start:05}.jsonl", documents[start : start + 2500])
    remote = fsspec.filesystem("memory")
    for path in sorted((tmp_path / "many").iterdir()):
        remote.pipe_file(f"/spread/{path.name}", path.read_bytes())
    for source in (tmp_path / "many", tmp_path / "a.parquet", "memory://spread"):
        reached = reach_module.reach(str(source), 128 * 16, 0.5)
        found = list(reached.documents())
        numbers = [int(text.split(".", 1)[0]) for _, text in found]
        assert 0.1 * size < reached.num_bytes < 0.4 * size
        assert reached.num_bytes == sum(len(text) for _, text in found)
        assert reached.note is None
        assert numbers == sorted(set(numbers))  # each once, in order, and each of them whole
        assert all(
            text == documents[number] for number, (_, text) in zip(numbers, found, strict=True)
        )
        hits = np.bincount(np.array(numbers) * 20 // 20_000, minlength=20)
        assert hits.min() > 0.5 * hits.mean()
        corpus = draw(str(source), 128, 16)
        assert corpus.stderr_factor == 1.0
        assert len(corpus.group_sizes) == 64


def test_windows_over_every_place_reach_every_document_equally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document is reached as often as windows cover the source, however long it is."""
    documents = texts(3000)
    documents[1500] = "1500." + "x" * 4000
    monkeypatch.setattr(reach_module, "BUDGET_BYTES", 20_000)
    monkeypatch.setattr(reach_module, "NUM_WINDOWS", 16)
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    hits = np.zeros(3000)
    tries = 200
    for turn in range(tries):
        reached = reach_module.reach(source, 100, turn / tries)
        for _, text in reached.documents():
            hits[int(text.split(".", 1)[0])] += 1 / tries
    covered = 20_000 / Path(source).stat().st_size
    assert hits.mean() == pytest.approx(covered, rel=0.05)
    assert hits[1500] == pytest.approx(covered, rel=0.15)
    assert hits[10:-10].min() > 0.5 * covered


def test_compressed_files_beyond_the_budget_give_their_beginnings_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(8000)
    for number in range(4):
        part = documents[number * 2000 : number * 2000 + 2000]
        write_jsonl(tmp_path / f"{number}.jsonl.gz", part)
    stored = sum(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(reach_module, "BUDGET_BYTES", stored // 8)
    corpus = draw(str(tmp_path), 32, 16)
    numbers = np.array(
        [
            int(text.split(".", 1)[0])
            for _, text in reach_module.reach(str(tmp_path), 512, 0.5).documents()
        ]
    )
    assert set(numbers // 2000) == {0, 1, 2, 3}
    assert (numbers % 2000).max() < 1500
    assert corpus.note is not None
    assert "beginnings" in corpus.note


def test_a_streamed_dataset_is_read_from_all_its_shards(tmp_path: Path) -> None:
    documents = texts(600)
    for number in range(6):
        table = pyarrow.table({"text": documents[number * 100 : number * 100 + 100]})
        parquet.write_table(table, tmp_path / f"train-{number}.parquet")
    corpus = draw(f"hf:{tmp_path}", 48, 24)
    starts = np.array(places(corpus.input_ids, stream(documents)))
    assert corpus.note is None
    assert (np.diff(starts) >= 24).all()
    assert starts[-1] > len(stream(documents)) * 0.9


def test_errors_are_true_of_spread_instances_and_too_small_of_first_ones(tmp_path: Path) -> None:
    """Share of one kind of document's words: alike within a document, unlike between them."""
    errors: dict[str, list[float]] = {"spread": [], "first": []}
    values: dict[str, list[float]] = {"spread": [], "first": []}
    for turn in range(60):
        generator = np.random.default_rng(turn)
        documents = [
            " ".join(generator.choice(list("0123456789"), 40, p=generator.dirichlet([0.2] * 10)))
            for _ in range(400)
        ]
        source = write_jsonl(tmp_path / f"{turn}.jsonl", documents)
        for rule in ("spread", "first"):
            corpus = draw(source, 64, 8, rule, seed=turn)
            of_seven = (corpus.input_ids == TOKENIZER.encode(" 7").ids[-1]).mean(axis=1)
            sizes = np.array(corpus.group_sizes)
            sums = np.add.reduceat(of_seven, np.cumsum(sizes) - sizes)
            left_out = (of_seven.sum() - sums) / (64 - sizes)
            values[rule].append(of_seven.mean())
            errors[rule].append(float(standard_error(of_seven.mean(), left_out, sizes)))
    ratio = {
        rule: np.sqrt(np.mean(np.square(errors[rule]))) / np.std(values[rule], ddof=1)
        for rule in errors
    }
    assert 0.75 < ratio["spread"] < 1.3
    assert ratio["first"] < 0.6
