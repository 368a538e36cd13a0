"""A pickle that would run code, in every place where a file of somebody else's is read."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from ke_ray import storage
from ke_ray.errors import KeRayError

EOS = 0


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def bomb(mark: Path) -> bytes:
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)  # noqa: S301 (it is ours)
    assert mark.exists(), "the bomb does not work"
    mark.unlink()
    return content


@pytest.mark.parametrize("written_by", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["model_000001.pt", "meta_000001.json", "step=1.ckpt"])
def test_in_a_file_of_a_training_tool(
    tmp_path: Path, mark: Path, bomb: bytes, name: str, written_by: str
) -> None:
    from ke_ray.checkpoints.find.catalog import list_checkpoints
    from ke_ray.models.loading import load_model

    sizes = dict.fromkeys(("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head"), 2)
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": {**sizes, "n_embd": 8}}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({}, tmp_path / "model_000001.pt")
    content = bomb if written_by == "pickle" else torch_bytes({"state_dict": {"x": Bomb(mark)}})
    (tmp_path / name).write_bytes(content)
    file = tmp_path / (name if name.endswith(".ckpt") else "model_000001.pt")
    list_checkpoints(str(file))
    refused(mark, lambda: load_model(file))


def refused(mark: Path, read: Callable[[], object]) -> str:
    """Reading raises one of ke_ray's own errors, and nothing was executed."""
    with pytest.raises(KeRayError) as caught:
        read()
    assert not mark.exists(), "the pickle was executed"
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CONFIG = {
    "model_type": "olmo", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
NATIVE = (
    "model: {d_model: 8, n_heads: 2, n_layers: 1, vocab_size: 9, embedding_size: 9, rope: "
    "true, include_bias: false, layer_norm_with_affine: false}"
)


@pytest.mark.parametrize("written_by", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model.safetensors", "model.pt"),
        *("pytorch_model-00001-of-00001.bin", "model-00001-of-00001.safetensors"),
        *("pytorch_model.bin.index.json", "model.safetensors.index.json", "config.json"),
        *("config.yaml", "tokenizer.json"),
    ],
)
def test_in_a_checkpoint(tmp_path: Path, mark: Path, bomb: bytes, name: str, written_by) -> None:
    from ke_ray.data.tokenizer import load_tokenizer
    from ke_ray.models.loading import load_model

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    native = name in ("model.pt", "config.yaml")
    (folder / ("config.yaml" if native else "config.json")).write_text(
        NATIVE if native else json.dumps(CONFIG)
    )
    if native:
        torch.save({"transformer.wte.weight": torch.zeros(9, 8)}, folder / "model.pt")
    content = bomb
    if written_by == "torch.save":
        content = torch_bytes({"model.embed_tokens.weight": Bomb(mark)})
    (folder / name).write_bytes(content)
    if name == "tokenizer.json":
        refused(mark, lambda: load_tokenizer(folder))
    else:
        refused(mark, lambda: load_model(folder))


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: [b], lambda b: {"layer0": b}])
def test_in_the_authors_coefficients(tmp_path: Path, mark: Path, bomb: bytes, wrap) -> None:
    from ke_ray.resuscitation.coefficients import find_coefficients

    path = tmp_path / "mlp_average_coefficients.pt"
    for content in (bomb, torch_bytes(wrap(Bomb(mark)))):
        path.write_bytes(content)
        refused(mark, lambda: find_coefficients(str(path), weights_sha256=None))


def test_in_coefficients_of_a_scan(tmp_path: Path, mark: Path, bomb: bytes) -> None:
    from ke_ray.results import ScanFolder, new_manifest

    manifest = new_manifest("scan", {}) | {"corpora": {"x": {}}, "identity": {"corpora": {"x": ""}}}
    folder = ScanFolder(str(tmp_path), manifest)
    storage.write_atomic(tmp_path / "coefficients" / "a.safetensors", bomb)
    refused(mark, lambda: folder.mean_coefficients("a"))
    storage.write_atomic(tmp_path / "entropy.parquet", bomb)
    refused(mark, folder.entropy)
    storage.write_atomic(tmp_path / "manifest.json", bomb)
    refused(mark, lambda: ScanFolder.open(str(tmp_path)))


def object_array(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Bomb(mark)] * 4], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors", "ids.parquet", "part.npy"])
def test_in_token_ids(tmp_path: Path, mark: Path, bomb: bytes, name: str) -> None:
    from ke_ray.data.corpus import build_corpus

    source = path = tmp_path / name
    if name == "part.npy":  # OLMo's own files have no header: any bytes are token ids
        source = tmp_path / "olmo.yaml"
        source.write_text(f"olmo: {{parts: [{path}], order: {tmp_path}/order.npy, chunk: 4}}")
        (tmp_path / "order.npy").write_bytes(object_array(mark))
    for content in (bomb, object_array(mark)):
        path.write_bytes(content)
        refused(
            mark,
            lambda: build_corpus(
                "x", str(source), num_instances=1, sequence_length=4, vocab_size=8
            ),
        )


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_in_documents(tmp_path: Path, mark: Path, bomb: bytes, suffix: str) -> None:
    from ke_ray.data.documents import iter_documents

    path = tmp_path / f"documents.{suffix}"
    path.write_bytes(bomb)
    refused(mark, lambda: list(iter_documents(str(path))))


def test_in_the_type_of_a_parquet_column(tmp_path: Path, mark: Path, bomb: bytes) -> None:
    """Arrow's old Python extension types are pickles in a column's metadata."""
    from ke_ray.data.documents import iter_documents
    from ke_ray.data.injection_schedule import load_schedule

    told = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    told[b"ARROW:extension:metadata"] = bomb
    table = pa.table({"text": ["a text"]})
    table = table.cast(pa.schema([pa.field("text", pa.string(), metadata=told)]))
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path)
    assert [text for text, _ in iter_documents(str(path))] == ["a text"]
    storage.read_table(path)
    assert not mark.exists()
    refused(mark, lambda: load_schedule(path))


@pytest.mark.parametrize("suffix", ["json", "yaml", "parquet"])
def test_in_facts_schedules_and_studies(
    tmp_path: Path, mark: Path, bomb: bytes, suffix: str
) -> None:
    from ke_ray.config import load_study
    from ke_ray.data.facts import load_facts
    from ke_ray.data.injection_schedule import load_schedule
    from ke_ray.studies.scan import ScanStudy
    from ke_ray.studies.sweep import load_sweep

    path = tmp_path / f"x.{suffix}"
    path.write_bytes(bomb)
    refused(mark, lambda: load_schedule(path))
    refused(mark, lambda: load_facts(path, "once"))
    refused(mark, lambda: load_study(path, ScanStudy))
    refused(mark, lambda: load_sweep(path))
    call = "!!python/object/apply:pathlib.Path"
    path.write_text(f"kind: {call}.touch [{call} [{mark}]]")
    refused(mark, lambda: load_study(path, ScanStudy))
    refused(mark, lambda: load_sweep(path))


def test_in_a_training_state(tmp_path: Path, mark: Path, bomb: bytes) -> None:
    """A state with a pickle in one of its files is no state: an older one is taken."""
    from ke_ray.training.checkpoint import States, TrainingState
    from ke_ray.training.parallel import Worker

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with closing(States(str(tmp_path / "state"), Worker(), identity="x")) as states:
        for step in (1, 2):
            states.save(TrainingState(step=step), model, optimizer)
        states.wait()
        newest = tmp_path / "state" / "step00000002"
        index = json.loads((newest / "state.json").read_text())
        assert len(index["sizes"]) >= 2
        for name in index["sizes"]:
            whole = (newest / name).read_bytes()
            for content in (bomb, torch_bytes({"weight": Bomb(mark)})):
                (newest / name).write_bytes(content)
                other = index | {"sizes": index["sizes"] | {name: len(content)}}
                (newest / "state.json").write_text(json.dumps(other))
                loaded = states.load(model, optimizer)
                assert loaded is not None
                assert loaded.step == 1, name
                assert not mark.exists()
            (newest / name).write_bytes(whole)
        (newest / "state.json").write_text(json.dumps(index))
        assert states.load(model, optimizer).step == 2


def test_in_a_folder_that_the_datasets_library_reads(
    tmp_path: Path, mark: Path, bomb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ke_ray.data.documents import iter_documents

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w") as archive:
        for ending, content in (("pickle", bomb), ("pyd", bomb), ("pth", torch_bytes(Bomb(mark)))):
            entry = tarfile.TarInfo(f"a.{ending}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(mark, lambda: list(iter_documents(f"hf:{folder}#pickle")))
    (folder / "x.tar").unlink()
    (folder / "x.pkl").write_bytes(bomb)
    refused(mark, lambda: list(iter_documents(f"hf:{folder}")))
