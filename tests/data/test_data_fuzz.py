"""A thousand mutated inputs for each parser of data: a value or a UserError, never more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutated

from ke_ray.data.corpus import build_corpus, parse_data_option
from ke_ray.data.hub_dataset import parse_hub_source
from ke_ray.data.olmo_order import OlmoSource, read_olmo_source
from ke_ray.data.sources import SourceFile, list_files, split_part
from ke_ray.data.stored_array import npy_array, safetensors_arrays
from ke_ray.data.tokenizer import load_tokenizer, train_bpe
from ke_ray.errors import DataError, UserError

THOUSAND = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SAFETENSORS_HEADER = json.dumps(
    {
        "__metadata__": {"format": "np"},
        "input_ids": {"dtype": "I64", "shape": [4, 2], "data_offsets": [0, 64]},
        "attention_mask": {"dtype": "BOOL", "shape": [4, 2], "data_offsets": [64, 72]},
    }
).encode()
NPY_HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (4, 2), }"
NPY_HEADER = NPY_HEADER.ljust(127) + b"\n"
OLMO_YAML = b"olmo:\n  parts: [a.npy, 'b-*.npy']\n  order: null\n  seed: 6198\n  chunk: 2048\n"

SNIPPETS = st.sampled_from(
    [
        *(bytes([character]) for character in b"\"{[}]':#O\0\xff"),
        *(b"&a", b"*a", b"-1", b"99999999999999999999", b"1e999", b"null"),
        *(b"!!python/object:os.system", b"[[[[" * 300),
    ]
)


def local_file(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return list_files(str(path))[0]


@THOUSAND
@given(
    header=mutated(SAFETENSORS_HEADER, SNIPPETS),
    length_change=st.sampled_from([0, 0, 0, -1, 7, 1 << 40]),
)
def test_fuzz_safetensors_headers(tmp_path: Path, header: bytes, length_change: int) -> None:
    length = max(len(header) + length_change, 0).to_bytes(8, "little")
    file = local_file(tmp_path / "a.safetensors", length + header + bytes(72))
    try:
        arrays = safetensors_arrays(file)
    except DataError:
        return
    for array in arrays.values():  # what is accepted can be read
        if array.shape:
            assert len(array.read_rows(0, array.shape[0])) == array.shape[0]


@THOUSAND
@given(content=mutated(NPY_HEADER + bytes(64), SNIPPETS))
def test_fuzz_npy_headers(tmp_path: Path, content: bytes) -> None:
    file = local_file(tmp_path / "a.npy", content)
    try:
        array = npy_array(file)
    except DataError:
        return
    if len(array.shape) == 2 and array.dtype.itemsize:
        assert array.read_rows(0, array.shape[0]).shape == array.shape


@THOUSAND
@given(content=mutated(OLMO_YAML, SNIPPETS))
def test_fuzz_olmo_descriptions(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "olmo.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_olmo_source(str(path)), OlmoSource)
    except UserError as error:
        assert len(str(error)) < 1000


OUTSIDE = ("..", "/./", "://", "::", "~")  # would read this machine's own files, or a network


@THOUSAND
@given(
    option=st.text(max_size=40)
    | st.lists(
        st.sampled_from(["a", "=", "/", "..", "#", "*", "[", "hf:", "://", "::", "s3", "~", "\0"]),
        max_size=8,
    ).map("".join)
)
def test_fuzz_data_options_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        name, source = parse_data_option(option)
        assert name not in ("", ".", "..")
        assert "/" not in name
        split_part(source)
        if source.startswith("hf:"):
            parse_hub_source(source)
        elif not source.startswith("/") and not any(mark in source for mark in OUTSIDE):
            build_corpus(name, source, num_instances=1, sequence_length=1)
    except UserError:
        pass


@THOUSAND
@given(data=st.data())
def test_fuzz_tokenizer_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.draw(mutated(TOKENIZER_JSON, SNIPPETS)))
    try:
        tokenizer = load_tokenizer(path)
    except DataError:
        return
    tokenizer.encode("some text")


TOKENIZER_JSON = train_bpe(["some text"] * 3, 262).to_str().encode()
