"""Documents from every kind of file; what is wrong is named with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ke_ray.data import documents as documents_module
from ke_ray.data.document import parse_document
from ke_ray.data.documents import iter_documents
from ke_ray.errors import DataError

TEXTS = ["One fish.", "Two — fish,\nand a line break.", "Drei Fische: äöü 🐟"]


def lines(texts: list[str]) -> bytes:
    rows = ({"id": str(i), "text": t, "source": "x"} for i, t in enumerate(texts))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def texts_of(source: str | list[str]) -> list[str]:
    return [text for text, _ in iter_documents(source)]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.json.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
    ],
)
def test_every_compression_gives_the_same_documents(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(lines(TEXTS)))
    found = list(iter_documents(str(tmp_path / name)))
    assert [text for text, _ in found] == TEXTS
    assert found[1][1] == f"{tmp_path / name}, line 2"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_archives_of_several_members_are_read_to_their_end(tmp_path: Path, pack) -> None:
    suffix = "gz" if pack is gzip.compress else "zst"
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(lines(TEXTS[:1])) + pack(lines(TEXTS[1:])))
    assert texts_of(str(path)) == TEXTS


def test_folder_glob_and_list_come_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl.gz", "c.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = lines([f"text of {name}"])
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "README.md").write_text("not a document")
    (tmp_path / ".hidden.jsonl").write_text("not a document")
    expected = ["text of a/1.jsonl.gz", "text of b/2.jsonl", "text of c.jsonl"]
    assert texts_of(str(tmp_path)) == expected
    assert texts_of(f"{tmp_path}/*/*.jsonl*") == expected[:2]
    assert texts_of([f"{tmp_path}/c.jsonl", f"{tmp_path}/a"]) == [expected[2], expected[0]]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    (tmp_path / "part[1].jsonl").write_bytes(lines(TEXTS))
    assert texts_of(str(tmp_path / "part[1].jsonl")) == TEXTS


def test_any_fsspec_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus/a.jsonl.gz", gzip.compress(lines(TEXTS)))
    assert texts_of("memory://corpus/a.jsonl.gz") == TEXTS
    assert texts_of("memory://corpus") == TEXTS
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    assert texts_of(f"file://{tmp_path}/a.jsonl") == TEXTS


def test_parquet_with_a_text_column_or_another(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    table = pyarrow.table({"text": TEXTS, "abstract": [t.upper() for t in TEXTS], "n": [1, 2, 3]})
    parquet.write_table(table, path, row_group_size=2)
    found = list(iter_documents(path))
    assert [text for text, _ in found] == TEXTS
    assert found[2][1] == f"{path}, row 3"
    assert texts_of(f"{path}#abstract") == [t.upper() for t in TEXTS]
    with pytest.raises(DataError, match="row 1: 'n' is int"):
        texts_of(f"{path}#n")
    with pytest.raises(DataError, match=r"no column 'body' \(it has: text, abstract, n\)"):
        texts_of(f"{path}#body")


def test_hugging_face_dataset_by_name_from_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(TEXTS))
    (folder / "validation.jsonl").write_bytes(lines(TEXTS[:1]))
    assert texts_of(f"hf:{folder}") == TEXTS
    assert texts_of(f"hf:{folder}:validation") == TEXTS[:1]
    with pytest.raises(DataError, match="no column 'body'"):
        texts_of(f"hf:{folder}#body")
    with pytest.raises(DataError, match="test"):
        texts_of(f"hf:{folder}:test")
    with pytest.raises(DataError, match="not of the form"):
        texts_of("hf:a:b:c:d")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b"[1, 2]", "JSON list, expected an object"),
        (b'{"body": "x", "id": 1}', r"no field 'text' \(it has: body, id\)"),
        (b'{"text": 3}', "'text' is int, expected a text"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": ""}', "the document is empty"),
        (b'{"text": " \\n\\t"}', "the document is empty"),
        (b'{"text": "\xff\xfe"}', "byte 10 is not UTF-8"),
        (b'{"text": "\\ud83d alone"}', "half a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_malformed_document_is_named_by_file_and_line(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines(TEXTS[:2]) + line + b"\n" + lines(TEXTS[2:]))
    with pytest.raises(DataError, match=message) as caught:
        texts_of(str(path))
    assert f"{path}, line 3" in str(caught.value)


def test_blank_lines_are_fine_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS) + b"\n \n")
    assert texts_of(str(path)) == TEXTS
    path.write_bytes(lines(TEXTS[:1]) + b"\n" + lines(TEXTS[1:]))
    with pytest.raises(DataError, match="line 2: blank"):
        texts_of(str(path))


def test_an_endless_line_is_refused_without_being_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"a" * (8 << 20)))
    with pytest.raises(DataError, match="line 1: longer than 1 MiB"):
        texts_of(str(path))


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(lines(TEXTS * 500))
    for name, content in {
        "cut.jsonl.gz": packed[:-50],
        "plain.jsonl.gz": lines(TEXTS),
        "wrong.jsonl.zst": b"\x28\xb5\x2f\xfdnot really",
        "wrong.parquet": b"PAR1 nonsense PAR1",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            texts_of(str(path))
        assert str(path) in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").touch()
    for source, message in {
        f"{tmp_path}/none.jsonl": "There is no",
        f"{tmp_path}/*.parquet": "matches no file",
        f"{tmp_path}/a**": "not a valid pattern",
        f"{tmp_path}/folder": "holds no file of the expected kinds",
        f"{tmp_path}/empty.jsonl": "holds no documents",
        "nosuch://a/b.jsonl": "Protocol not known",
        "": "The data source is ''",
        "a\0b": "The data source is",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(DataError, match=message):
            texts_of(source)


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_fuzz_a_mutated_line_is_a_text_or_a_data_error(data: st.DataObject) -> None:
    line = bytearray(lines(TEXTS)[:-1].split(b"\n")[data.draw(st.integers(0, 2))])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(line)))
        match data.draw(st.integers(0, 3)):
            case 0:
                line[place : place + 1] = data.draw(st.binary(min_size=1, max_size=3))
            case 1:
                del line[place : place + data.draw(st.integers(1, 20))]
            case 2:
                line[place:place] = data.draw(
                    st.sampled_from([b'"', b"\\ud800", b"{", b"[" * 3000, b"\0", b"1e999", b"null"])
                )
            case 3:
                line = line[:place]
    try:
        text = parse_document(bytes(line), "f, line 1")
    except DataError as error:
        assert str(error).startswith("f, line 1")
    else:
        text.encode("utf-8")
        assert text.strip()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]),
    cut=st.floats(0, 1),
    junk=st.binary(max_size=12),
)
def test_fuzz_a_damaged_file_gives_texts_or_a_data_error(
    tmp_path: Path, kind: str, cut: float, junk: bytes
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS * 20}), path)
        content = path.read_bytes()
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
        content = pack(lines(TEXTS * 20))
    place = int(cut * len(content))
    path.write_bytes(content[:place] + junk + content[place + len(junk) :])
    try:
        found = texts_of(str(path))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(text, str) and text.strip() for text in found)
