"""Files appear whole or not at all, and stay where they belong."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray import storage
from ke_ray.errors import StorageError
from ke_ray.storage import temporary as temporary_files


@given(st.text())
def test_a_slug_is_one_safe_name(text):
    name = storage.slug(text)
    assert name
    assert "/" not in name
    assert name.strip(".")
    assert storage.slug(name) == name


@pytest.mark.parametrize("part", ["../x", "/etc/passwd", "a/../../b", ".."])
def test_joining_never_leaves_the_folder(part):
    with pytest.raises(StorageError, match="would leave the folder"):
        storage.join("/results", part)


@pytest.mark.parametrize("base", ["{tmp}/folder", "file://{tmp}/folder", "memory://folder"])
def test_round_trip_under_any_uri(base, tmp_path):
    uri = storage.join(base.format(tmp=tmp_path), "deep", "file.json")
    assert not storage.exists(uri)
    storage.write_json(uri, {"a": [1.5, None, float("nan")]})
    assert storage.read_json(uri) == {"a": [1.5, None, None]}
    assert storage.list_dir(uri.rsplit("/", 1)[0]) == ["file.json"]
    storage.remove(uri)
    assert not storage.exists(uri)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomic(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="no space is left"):
        storage.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_breaks_off_leaves_no_object(s3, monkeypatch):
    import s3fs

    uri = storage.join(s3, "parts")
    storage.write_atomic(storage.join(s3, "other"), b"x")  # the store has answered
    write, calls = s3fs.S3File.write, []

    def break_off(file, data):
        calls.append(len(data))
        if len(calls) == 12:
            raise MemoryError("no room for a piece")
        return write(file, data)

    monkeypatch.setattr(s3fs.S3File, "write", break_off)
    monkeypatch.setenv("KE_RAY_STORE_GIVE_UP_S", "0")
    with pytest.raises((MemoryError, StorageError), match="no room for a piece"):
        storage.write_atomic(uri, [memoryview(bytes(2**23))] * 12)
    gc.collect()
    fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    fs.invalidate_cache()
    assert not storage.exists(uri)
    assert fs.call_s3("list_multipart_uploads", Bucket="shared").get("Uploads", []) == []


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        storage.check_writable(tmp_path / "file")


def test_an_unknown_store_says_what_to_install():
    with pytest.raises(StorageError, match="fsspec driver"):
        storage.exists("nosuchstore://bucket/x")


def test_not_json_and_not_parquet_say_so(tmp_path):
    (tmp_path / "x").write_text("{")
    with pytest.raises(StorageError, match="is not JSON"):
        storage.read_json(tmp_path / "x")
    with pytest.raises(StorageError, match="is not a Parquet file"):
        storage.read_table(tmp_path / "x")


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path, monkeypatch):
    code = (
        "import os, signal, sys, pathlib\n"
        "from ke_ray import storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_atomic(sys.argv[1], b'half')\n"
    )
    target = tmp_path / "a.json"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.ke-ray-[0-9a-f]{16}-a\.json", left.name)
    others = (
        ".a.json.swp",
        ".a.json.0123abcd",
        ".ke-ray-notes",
        storage.temporary_path(tmp_path / "b.json").name,
    )
    for name in others:
        (tmp_path / name).write_text("another's")
    alive = storage.temporary_path(target)
    with alive.open("w") as file:
        storage.hold(file.fileno())
        monkeypatch.setattr(temporary_files, "_LEFTOVER_AGE_S", -1.0)
        storage.write_atomic(target, b"whole")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([alive.name, *others, "a.json"])


def test_a_large_folder_is_not_looked_through_for_every_file(tmp_path, monkeypatch):
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda *place: (looks.append(place), scandir(*place))[1])
    for number in range(260):
        storage.write_atomic(tmp_path / f"{number}.json", "{}")
    assert 200 <= len(looks) <= 202
    leftover = storage.temporary_path(tmp_path / "1.json")
    leftover.touch()
    os.utime(leftover, (0, 0))
    monkeypatch.setattr(temporary_files, "_LARGE_FOLDER_S", 0.0)  # half a minute later
    storage.write_atomic(tmp_path / "1.json", "{}")
    assert not leftover.exists()


@pytest.mark.parametrize("url", ["http://[.csv", "https://a\\b/c", "http://h:port/x"])
def test_what_is_no_address_is_one_message(url):
    with pytest.raises(StorageError, match="cannot be opened"):
        storage.exists(url)
