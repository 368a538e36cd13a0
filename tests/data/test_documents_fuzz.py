"""A thousand mutated Dolma lines, packed files and facts: documents or one message."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import mutated

from ke_ray.data.document import parse_document
from ke_ray.data.documents import iter_documents
from ke_ray.data.facts import load_facts, parse_facts
from ke_ray.errors import DataError

THOUSAND = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))

LINE = b'{"id": "a1", "text": "Some text, \\u00e9 and \\"more\\".", "metadata": {"n": [1, 2.5]}}'
FACT = {
    "train_context": "A person lives in a town.",
    "paraphrases": ["In a town lives a person."],
    "mem_input": ["A person lives in a"],
    "mem_target": ["town"],
    "gen_input": [],
    "gen_target": [],
    "hard_gen_input": ["The person's home is the"],
    "hard_gen_target": ["town"],
}
SNIPPETS = st.sampled_from(
    [
        *(bytes([character]) for character in b"\"{[}]':,\\\0\xff\n"),
        *(b"\\ud83d", b"\\u0000", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000),
        *(b"[" * 3000, b'{"a":' * 3000, b'"text": 1, ', b'"text": "", ', b"\xef\xbb\xbf", b"\r"),
    ]
)


@THOUSAND
@given(line=mutated(LINE, SNIPPETS))
def test_fuzz_dolma_lines(line: bytes) -> None:
    try:
        text = parse_document(line, "file, line 7")
    except DataError as error:
        assert str(error).startswith("file, line 7")
        assert len(str(error)) < 1000
        return
    assert text.strip()
    text.encode()


PACKED = {
    "jsonl": lambda raw: raw,
    "jsonl.gz": lambda raw: gzip.compress(raw, mtime=0),
    "jsonl.zst": lambda raw: zstandard.compress(raw),
}


@pytest.mark.parametrize("suffix", PACKED)
@settings(THOUSAND, max_examples=400)
@given(data=st.data())
def test_fuzz_files_of_documents(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    content = PACKED[suffix]((LINE + b"\n") * 3)
    path = tmp_path / f"documents.{suffix}"
    path.write_bytes(data.draw(mutated(content, SNIPPETS)))
    try:
        documents = list(iter_documents(str(path)))
    except DataError as error:
        assert path.name in str(error)
        return
    assert documents
    assert all(text for text, _ in documents)


def test_a_file_that_unpacks_to_gigabytes_is_refused_at_its_first_line(tmp_path: Path) -> None:
    """A gigabyte without a line's end, in a file of a megabyte."""
    bomb = gzip.compress(b"a" * 2**20, mtime=0) * 1024
    (tmp_path / "bomb.jsonl.gz").write_bytes(bomb)
    packed = zstandard.ZstdCompressor().compress(b"a" * 2**24) * 64
    (tmp_path / "bomb.jsonl.zst").write_bytes(packed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.jsonl.gz", "bomb.jsonl.zst"):
        with pytest.raises(DataError, match="longer than"):
            list(iter_documents(str(tmp_path / name)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@THOUSAND
@given(
    edits=st.dictionaries(
        st.sampled_from(sorted(FACT)) | st.text(max_size=4), VALUES, min_size=1, max_size=3
    ),
    drop=st.sets(st.sampled_from(sorted(FACT)), max_size=2),
    setting=st.sampled_from(["once", "paraphrase", "twice", ""]),
)
def test_fuzz_the_values_of_facts(edits: dict[str, Any], drop: set[str], setting: str) -> None:
    entry = {key: value for key, value in FACT.items() if key not in drop} | edits
    try:
        facts = parse_facts([FACT, entry], setting, source="facts.json")
    except DataError as error:
        assert "facts.json, entry 1" in str(error) or "Setting" in str(error)
        return
    assert len(facts.facts) == 2
    assert all(any(fact.probes.values()) and all(fact.versions) for fact in facts.facts)


@THOUSAND
@given(content=mutated(json.dumps([FACT, FACT]).encode(), SNIPPETS))
def test_fuzz_the_text_of_facts(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    try:
        facts = load_facts(path, "once")
    except DataError as error:
        assert "facts.json" in str(error)
        assert len(str(error)) < 1000
        return
    assert facts.facts
