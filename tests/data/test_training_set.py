"""Training rows: packed once, drawn by seed, the same for every number of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ke_ray import storage
from ke_ray.data import training_set
from ke_ray.data.corpus import build_corpus
from ke_ray.data.olmo_order import rebuild_order
from ke_ray.data.tokenizer import train_bpe
from ke_ray.data.training_set import PackedDataset, prepare_training_set
from ke_ray.errors import DataError, StorageError
from ke_ray.training.batches import BatchPlan

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TOKENIZER = train_bpe([" ".join(WORDS)] * 3, 290)
T = 12


def write_documents(path: Path, count: int = 150) -> str:
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, 15)) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def prepare(source: str, cache: Path, **options: object) -> PackedDataset:
    given = {"sequence_length": T, "tokenizer": TOKENIZER, "eos_token_id": 0, **options}
    return prepare_training_set(source, cache, **given)


def batch_rows(dataset: PackedDataset, step: int, global_batch_size: int) -> np.ndarray:
    return BatchPlan(dataset, global_batch_size).instances(step + 1, 0, global_batch_size)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_documents(tmp_path / "documents.jsonl")


def test_the_stored_rows_are_those_of_the_corpus(source: str, tmp_path: Path) -> None:
    corpus = build_corpus(
        "c", source, num_instances=None, sequence_length=T, tokenizer=TOKENIZER, eos_token_id=0
    )
    dataset = prepare(source, tmp_path / "cache")
    assert len(dataset) == corpus.num_instances
    assert dataset.num_tokens == corpus.num_tokens
    assert dataset.dtype == "uint16"
    rows = dataset.rows(range(len(dataset)))
    assert rows.dtype == np.int64
    assert np.array_equal(rows[np.argsort(dataset.drawn)], corpus.input_ids)
    assert np.array_equal(dataset.rows([5, 2]), corpus.input_ids[dataset.drawn[[5, 2]]])


def test_a_draw_depends_on_its_seed_alone(source: str, tmp_path: Path) -> None:
    a = prepare(source, tmp_path / "a", num_instances=20, seed=3)
    b = prepare(source, tmp_path / "b", num_instances=20, seed=3)
    assert a.drawn.tolist() == b.drawn.tolist()
    assert len(set(a.drawn.tolist())) == 20
    assert a.sha256 == b.sha256
    other = prepare(source, tmp_path / "a", num_instances=20, seed=4)
    assert set(other.drawn.tolist()) != set(a.drawn.tolist())
    assert other.sha256 != a.sha256
    assert a.drawn.tolist() == prepare(source, tmp_path / "a", seed=3).drawn[:20].tolist()


def test_each_epoch_visits_every_instance_once_in_its_own_order(
    source: str, tmp_path: Path
) -> None:
    dataset = prepare(source, tmp_path, num_instances=24, seed=1)
    epochs = [
        np.concatenate([batch_rows(dataset, step, 6) for step in range(4 * e, 4 * e + 4)])
        for e in range(3)
    ]
    for epoch, visited in enumerate(epochs):
        assert sorted(visited.tolist()) == list(range(24))
        assert visited.tolist() == dataset.order(epoch).tolist()
    assert len({tuple(visited.tolist()) for visited in epochs}) == 3
    other = prepare(source, tmp_path, num_instances=24, seed=2)
    assert other.order(0).tolist() != dataset.order(1).tolist()


def test_row_r_of_step_s_is_the_same_for_every_number_of_workers(
    source: str, tmp_path: Path
) -> None:
    """Workers and micro-batches take slices; put together they are the same batch."""
    dataset = prepare(source, tmp_path, num_instances=50, seed=7)
    for step in (0, 3, 4, 9, 13):  # over the ends of epochs: 50 // 12 = 4 steps each
        whole = dataset.rows(batch_rows(dataset, step, 12))
        epoch, place = divmod(step, 4)
        expected = dataset.order(epoch)[place * 12 : place * 12 + 12]
        assert np.array_equal(whole, dataset.rows(expected))
        for workers in (1, 2, 3, 4):
            parts = [
                dataset.rows(np.array_split(batch_rows(dataset, step, 12), workers)[rank])
                for rank in range(workers)
            ]
            assert np.array_equal(np.concatenate(parts), whole)


def test_the_corpus_is_tokenised_once(source: str, tmp_path: Path, monkeypatch) -> None:
    packed: list[str] = []
    real = training_set.pack_to_file

    def counting(source: str, *args: object, **options: object):
        packed.append(source)
        return real(source, *args, **options)

    monkeypatch.setattr(training_set, "pack_to_file", counting)
    prepare(source, tmp_path)
    prepare(source, tmp_path, num_instances=9, seed=4)
    assert len(packed) == 1
    prepare(source, tmp_path, sequence_length=T + 1)
    prepare(source, tmp_path, eos_token_id=1)
    prepare(source, tmp_path, tokenizer=train_bpe(WORDS, 270))
    assert len(packed) == 4
    write_documents(Path(source), 120)
    assert len(prepare(source, tmp_path)) < 120 * 20
    assert len(packed) == 5


def _prepare_in_process(source: str, cache: str, results: multiprocessing.Queue) -> None:
    dataset = prepare(source, Path(cache))
    results.put((dataset.sha256, len(dataset)))


def test_processes_that_pack_at_once_agree(source: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_prepare_in_process, args=(source, str(tmp_path / "c"), results))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert len(set(found)) == 1
    names = sorted(path.suffix for path in (tmp_path / "c").iterdir())
    assert names == [".bin", ".json", ".lock"]


def test_a_failure_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    write_documents(path)
    path.write_text(path.read_text() + '{"text": 3}\n')
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="line 151"):
        prepare(str(path), cache)
    assert [p.suffix for p in cache.iterdir() if p.suffix != ".lock"] == []
    (cache / f".{'0' * 32}.bin.left").touch()
    with pytest.raises(DataError, match="no instance"):
        prepare(write_documents(tmp_path / "short.jsonl", 1), cache, sequence_length=5000)


def test_an_unfinished_file_of_a_killed_process_is_cleared(source: str, tmp_path: Path) -> None:
    name = prepare(source, tmp_path / "a").path.name
    cache = tmp_path / "b"
    cache.mkdir()
    left, other = storage.temporary_path(cache / name), cache / f".{name}.swp"
    for path in (left, other):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    dataset = prepare(source, cache)
    assert dataset.path.name == name
    assert not left.exists()
    assert other.exists()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 8_000):
        path = write_documents(tmp_path / f"{count}.jsonl", count)
        tracemalloc.start()
        prepare(path, tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 8_000 * 30 * 8  # the draw is 8 bytes a row


def test_ready_made_rows_must_be_full(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 70_000, (30, 16))
    np.save(tmp_path / "ids.npy", ids)
    dataset = prepare(str(tmp_path / "ids.npy"), tmp_path / "cache", tokenizer=None)
    assert dataset.dtype == "uint32"
    assert np.array_equal(dataset.rows(range(30)), ids[dataset.drawn, :T])
    small = prepare(str(tmp_path / "ids.npy"), tmp_path / "cache", max_instances=7, tokenizer=None)
    assert sorted(small.drawn.tolist()) == list(range(7))
    with pytest.raises(DataError, match="instance 0 has 16 real tokens; .* needs 17"):
        prepare(str(tmp_path / "ids.npy"), tmp_path / "cache", sequence_length=17)


def test_olmo_order_is_a_training_source(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, 20 * T, dtype=np.uint16)
    (tmp_path / "part.npy").write_bytes(tokens.astype("<u2").tobytes())
    (tmp_path / "o.yaml").write_text(f"olmo:\n  parts: [{tmp_path}/part.npy]\n  chunk: {T}\n")
    dataset = prepare(str(tmp_path / "o.yaml"), tmp_path / "cache", max_instances=8)
    expected = tokens.reshape(20, T)[rebuild_order(20)[:8]]
    assert np.array_equal(dataset.rows(np.argsort(dataset.drawn)), expected)


def test_a_corpus_that_does_not_fit_the_training_is_refused(source: str, tmp_path: Path) -> None:
    size = len(prepare(source, tmp_path))
    with pytest.raises(DataError, match=f"{size + 1} instances of 12 tokens .* holds {size};"):
        prepare(source, tmp_path, num_instances=size + 1)
    with pytest.raises(DataError, match=f"{size + 1} rows, but .* a batch of 1 to {size} rows"):
        prepare(source, tmp_path).steps_per_epoch(size + 1)
    with pytest.raises(DataError, match="outside the model's vocabulary of 50"):
        prepare(source, tmp_path, vocab_size=50)  # seen from the cache's own record
    with pytest.raises(DataError, match="need a tokenizer"):
        prepare(source, tmp_path / "new", tokenizer=None)
    with pytest.raises(DataError, match="seed of the draw is -1"):
        prepare(source, tmp_path, seed=-1)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        prepare(source, tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_message(source: str, tmp_path: Path, monkeypatch) -> None:
    """The temporary file is replaced by a device that is always full."""

    def onto_full_device(descriptor: int) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)

    monkeypatch.setattr("ke_ray.storage.hold", onto_full_device)
    with pytest.raises(StorageError, match="No space left on device"):
        prepare(source, tmp_path / "cache")
