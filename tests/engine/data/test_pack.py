"""Corpora packed on Ray: the rows of the single-process path, however they are cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ke_ray.cli import app
from ke_ray.data.corpus import build_corpus
from ke_ray.data.parallel_packing import plan_pieces
from ke_ray.data.tokenizer import save_tokenizer, train_bpe
from ke_ray.data.training_set import prepare_training_set
from ke_ray.engine.data.pack import OnProgress, pack_corpus
from ke_ray.errors import DataError, ResultsError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TOKENIZER = train_bpe([" ".join(WORDS)] * 3, 290)
T, EOS = 12, 0


def texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, 40)))) for _ in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A folder of plain and compressed documents."""
    folder = tmp_path / "documents"
    folder.mkdir()
    lines = ["".join(json.dumps({"text": t}) + "\n" for t in texts(n, 60)) for n in range(2)]
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "b.json.gz").write_bytes(gzip.compress(lines[1].encode()))
    return str(folder)


def pack(source: str, output: Path, tokenizer: Path, **options) -> dict:
    given = {"eos_token_id": EOS, "sequence_length": T, "piece_bytes": 700, "file_tokens": 150}
    return pack_corpus(source, str(output), tokenizer=str(tokenizer), **given | options)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_tokenizer(TOKENIZER, str(tmp_path / "tokenizer"), eos_token_id=EOS)
    return tmp_path / "tokenizer"


def test_the_rows_are_those_of_one_process(source: str, tokenizer: Path, tmp_path: Path) -> None:
    assert len(plan_pieces(source, 700)) > 6
    manifest = pack(source, tmp_path / "packed", tokenizer)
    rows = str(tmp_path / "packed" / "rows")
    assert len(manifest["rows"]) > 6
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"manifest.json", "rows"}
    text = {"tokenizer": TOKENIZER, "eos_token_id": EOS}
    for num_instances in (None, 40):
        shape = {"num_instances": num_instances, "sequence_length": T}
        alone = build_corpus("c", source, **shape, **text)
        together = build_corpus("c", rows, **shape)
        assert np.array_equal(together.input_ids, alone.input_ids)
        assert together.sha256 == alone.sha256
    assert alone.input_ids.max() <= manifest["largest_id"] < 290
    shape = {"sequence_length": T, "vocab_size": 290, "seed": 3, "num_instances": 50}
    alone = prepare_training_set(source, tmp_path / "cache", **shape, **text)
    together = prepare_training_set(rows, tmp_path / "cache", **shape)
    assert together.sha256 == alone.sha256
    assert together.dtype == alone.dtype == manifest["config"]["dtype"] == "uint16"
    again = pack(source, tmp_path / "packed", tokenizer)
    assert again["rows"] == manifest["rows"]


def test_an_attempt_goes_on_where_it_was(source: str, tokenizer: Path, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "whole", tokenizer)
    output = tmp_path / "packed"

    def stop_after(limit: int, phase: str) -> OnProgress:
        def stop(what: str, done: int, total: int) -> None:
            if what.startswith(phase) and done == limit:
                raise KeyboardInterrupt

        return stop

    for phase, kind in (("pieces", "tokens"), ("row files", "rows")):
        with pytest.raises(KeyboardInterrupt):
            pack(source, output, tokenizer, on_progress=stop_after(3, phase))
        made = {path: path.stat().st_mtime_ns for path in (output / kind).iterdir()}
        assert len(made) >= 3
    with pytest.raises(ResultsError, match="differs in its files, tokenizer"):
        pack(source, output, tokenizer, eos_token_id=1)
    assert pack(source, output, tokenizer)["rows"] == whole["rows"]
    for path, time_ns in made.items():  # row files that were there
        assert path.stat().st_mtime_ns == time_ns
    for name in whole["rows"]:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parquet_is_cut_by_rows(tokenizer: Path, tmp_path: Path) -> None:
    source = str(tmp_path / "c.parquet")
    pq.write_table(pa.table({"abstract": texts(2, 70)}), source, row_group_size=9)
    source += "#abstract"
    assert len(plan_pieces(source, 700)) > 2
    pack(source, tmp_path / "packed", tokenizer)
    command = ["data", "pack", source, "--tokenizer", str(tokenizer), "--eos-token-id", str(EOS)]
    command += ["--sequence-length", str(T), "--output", str(tmp_path / "by_command")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "by_command" / "rows").iterdir()  # of pieces of the usual size
    assert f"source of token ids {file.parent}" in done.output
    parts = [np.load(path) for path in sorted((tmp_path / "packed" / "rows").iterdir())]
    assert np.array_equal(np.load(file), np.concatenate(parts))
    shape = {"num_instances": None, "sequence_length": T}
    alone = build_corpus("c", source, **shape, tokenizer=TOKENIZER, eos_token_id=EOS)
    assert build_corpus("c", str(tmp_path / "packed" / "rows"), **shape).sha256 == alone.sha256


def test_the_first_malformed_document_is_named(
    source: str, tokenizer: Path, tmp_path: Path
) -> None:
    (Path(source) / "d.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    (Path(source) / "e.jsonl").write_text("no document")
    with pytest.raises(DataError, match=r"d\.jsonl, line 2"):
        pack(source, tmp_path / "packed", tokenizer)
    with pytest.raises(DataError, match="fewer than the 999999 of one row"):
        pack(str(Path(source) / "a.jsonl"), tmp_path / "p", tokenizer, sequence_length=999_999)
