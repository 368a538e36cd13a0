"""A thousand mutated weight files, indexes and configurations: one clear error or a model."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.formats.weights import open_weights
from ke_ray.errors import CheckpointError, UserError
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model

pytestmark = pytest.mark.slow

THOUSAND = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_decoder) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "x"
    save_model(tiny_decoder("olmo", hidden_size=8, intermediate_size=8), folder)
    return folder


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def broken_or_read(folder: Path) -> None:
    try:
        weights_sha256(folder)
    except (CheckpointError, UserError) as error:
        assert str(error)
        assert len(str(error)) < 2000


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=6),
    st.lists(st.integers(-1, 2**63), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@THOUSAND
@given(data=st.data())
def test_mutated_safetensors_bytes(whole: Path, data) -> None:
    path = whole / "model.safetensors"
    original = path.read_bytes()
    before = peak_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 7) | st.integers(8, 8 + length))
        mutated[where] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        mutated = mutated[: data.draw(st.integers(0, len(mutated)))]
    try:
        path.write_bytes(mutated)
        broken_or_read(whole)
    finally:
        path.write_bytes(original)
    assert peak_bytes() - before < 256 * 2**20


@THOUSAND
@given(data=st.data())
def test_mutated_safetensors_header(whole: Path, data) -> None:
    path = whole / "model.safetensors"
    original = path.read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    header = json.loads(original[8 : 8 + length])
    names = sorted(set(header) - {"__metadata__"})
    name = data.draw(st.sampled_from(names))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole", "name"]))
    value = data.draw(VALUES)
    if field == "whole":
        header[name] = value
    elif field == "name":
        header[str(value)] = header.pop(name)
    else:
        header[name] = header[name] | {field: value}
    text = json.dumps(header).encode()
    try:
        path.write_bytes(struct.pack("<Q", len(text)) + text + original[8 + length :])
        broken_or_read(whole)
    finally:
        path.write_bytes(original)


CONFIG_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters", "head_dim"),
    *("max_position_embeddings", "tie_word_embeddings", "attention_bias", "clip_qkv", "dtype"),
    *("pad_token_id", "eos_token_id", "auto_map", "quantization_config", "attention_dropout"),
    *("layer_types", "initializer_range", "architectures", "transformers_version", "use_cache"),
)


@THOUSAND
@given(
    edits=st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, min_size=1, max_size=3),
    drop=st.sets(st.sampled_from(CONFIG_KEYS), max_size=1),
)
def test_mutated_config_json(whole: Path, edits, drop) -> None:
    path = whole / "config.json"
    original = path.read_text()
    values = {key: value for key, value in json.loads(original).items() if key not in drop}
    before = peak_bytes()
    try:
        path.write_text(json.dumps(values | edits))
        load_model(whole)
    except (CheckpointError, UserError) as error:
        assert str(error)
        assert len(str(error)) < 2000
    finally:
        path.write_text(original)
    assert peak_bytes() - before < 512 * 2**20


@THOUSAND
@given(data=st.data())
def test_mutated_shard_index(whole: Path, tmp_path_factory, data) -> None:
    folder = whole.parent / "shards"
    if not folder.exists():
        folder.mkdir()
        tensors = load_file(whole / "model.safetensors")
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[:5]}
        shards["model-00002-of-00002.safetensors"] = names[5:]
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, folder / file)
        (folder / "config.json").write_text((whole / "config.json").read_text())
        index = {"metadata": {}, "weight_map": {n: f for f, held in shards.items() for n in held}}
        (folder / "whole.json").write_text(json.dumps(index))
    index = json.loads((folder / "whole.json").read_text())
    kind = data.draw(st.sampled_from(["entry", "key", "map", "top", "bytes"]))
    value = data.draw(VALUES | st.sampled_from(["/etc/passwd", "../x.safetensors", "", "."]))
    name = data.draw(st.sampled_from(sorted(index["weight_map"])))
    if kind == "entry":
        index["weight_map"][name] = value
    elif kind == "key":
        index["weight_map"][str(value)] = index["weight_map"].pop(name)
    elif kind == "map":
        index["weight_map"] = value
    text = json.dumps(value if kind == "top" else index).encode()
    if kind == "bytes":
        where = data.draw(st.integers(0, len(text) - 1))
        text = text[:where] + data.draw(st.binary(max_size=3)) + text[where + 1 :]
    (folder / "model.safetensors.index.json").write_bytes(text)
    broken_or_read(folder)


@THOUSAND
@given(data=st.data())
def test_mutated_pickle(whole: Path, tmp_path_factory, data) -> None:
    folder = whole.parent / "pickled"
    path = folder / "pytorch_model.bin"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text((whole / "config.json").read_text())
        torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, folder / "original")
    mutated = bytearray((folder / "original").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        mutated[where] = data.draw(st.integers(0, 255))
    path.write_bytes(mutated[: data.draw(st.none() | st.integers(0, len(mutated)))])
    broken_or_read(folder)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)  # sparse: the length is true, the header is not
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    before = peak_bytes()
    with pytest.raises(CheckpointError):
        open_weights(tmp_path)
    assert peak_bytes() - before < 128 * 2**20
