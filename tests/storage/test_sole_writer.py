"""One command at a time: on local files, in memory, and on a real S3 service."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ke_ray import storage
from ke_ray.errors import ResultsError, StorageError, StoreOutageError
from ke_ray.storage import sole_writer as module
from ke_ray.storage.ownership import claimed
from ke_ray.storage.sole_writer import confirm_lease, is_held, sole_writer
from ke_ray.storage.uris import filesystem

HOLD = (
    "import sys, time\n"
    "from ke_ray.storage.sole_writer import sole_writer\n"
    "with sole_writer(sys.argv[1], 'out'):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture(params=["file", "memory", "s3"])
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = uuid.uuid4().hex
    if request.param == "file":
        return str(tmp_path / name / ".ke-ray.lock")
    base = request.getfixturevalue("s3") if request.param == "s3" else "memory://locks"
    return f"{base}/{name}/.ke-ray.lock"


@contextmanager
def other_command(lock: str) -> Iterator[subprocess.Popen]:
    """A process of its own that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def in_thread(function: Callable[[], None]) -> BaseException | None:
    """What a function raises as another command would call it."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    return raised[0] if raised else None


def take(lock: str) -> None:
    with sole_writer(lock, "out"):
        pass


def test_a_second_writer_is_told_who_writes_and_nothing_is_left_in_the_end(lock: str) -> None:
    with sole_writer(lock, "out"):
        assert is_held(lock)
        with sole_writer(lock, "out"):  # a part of the same command
            pass
        error = in_thread(lambda: take(lock))
        assert isinstance(error, ResultsError)
        assert f"process {os.getpid()} on {os.uname().nodename}, since 20" in str(error)
        assert ("expires after 60 s" in str(error)) == (not storage.is_local(lock))
    assert not is_held(lock)
    assert not storage.exists(lock)
    assert in_thread(lambda: take(lock)) is None


def test_of_many_writers_at_once_one_succeeds(lock: str) -> None:
    inside, outcomes = [], []
    gate, done = threading.Barrier(6), threading.Event()

    def work() -> None:
        gate.wait(60)
        try:
            with sole_writer(lock, "out"):
                inside.append(1)
                done.wait(60)
        except ResultsError as error:
            outcomes.append(error)
        if len(outcomes) == 5:
            done.set()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert (len(inside), len(outcomes)) == (1, 5)


def test_a_killed_holder_frees_a_local_lock_at_once(tmp_path: Path) -> None:
    lock = str(tmp_path / "out" / ".ke-ray.lock")
    with other_command(lock) as process:
        with pytest.raises(ResultsError, match=f"process {process.pid} on "):
            take(lock)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Path(lock).exists()
        take(lock)
    assert not Path(lock).exists()


def test_a_killed_holder_frees_a_lease_when_it_lapses(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = f"{s3}/{uuid.uuid4().hex}/.ke-ray.lock"
    with other_command(lock) as process:
        process.kill()
        process.wait()
        with pytest.raises(ResultsError, match=rf"process {process.pid} .*expires after 60 s"):
            take(lock)
        monkeypatch.setattr(module, "EXPIRES_S", 0.5)
        monkeypatch.setattr(module, "HEARTBEAT_S", 0.2)
        take(lock)
    assert not storage.exists(lock)


def test_a_holder_whose_clock_is_behind_keeps_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = f"memory://locks/{uuid.uuid4().hex}/.ke-ray.lock"
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    with sole_writer(lock, "out"):
        monkeypatch.setattr(module, "EXPIRES_S", 0.0)  # what it writes always looks too old
        error = in_thread(lambda: take(lock))
        assert isinstance(error, ResultsError)
    take(lock)


def test_a_lease_that_was_taken_over_interrupts_and_is_left_to_its_new_holder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = f"memory://locks/{uuid.uuid4().hex}/.ke-ray.lock"
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    other = json.dumps({"ke_ray": "lock", "token": "other", "renewed_at": 0.0}).encode()

    def stand_still() -> None:
        with sole_writer(lock, "out"):
            storage.write_atomic(lock, other)
            threading.Event().wait(30)

    with pytest.raises(KeyboardInterrupt):
        stand_still()
    assert "took over 'out'" in caplog.text
    assert storage.read_bytes(lock) == other


def test_of_many_that_take_over_a_dead_lease_one_succeeds(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = f"{s3}/{uuid.uuid4().hex}/.ke-ray.lock"
    dead = json.dumps({"ke_ray": "lock", "token": "dead", "renewed_at": 0.0}).encode()
    storage.write_atomic(lock, dead)
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)  # the store decides, no time that passes
    gate, replace = threading.Barrier(4), storage.replace

    def all_at_once(uri: str, data: bytes, expected: bytes) -> bool:
        if expected == dead:
            gate.wait(60)  # all have seen that it is dead
        return replace(uri, data, expected)

    monkeypatch.setattr(storage, "replace", all_at_once)
    inside, refused, done = [], [], threading.Event()

    def work() -> None:
        try:
            with sole_writer(lock, "out"):
                inside.append(1)
                done.wait(60)
        except ResultsError as error:
            refused.append(error)
            if len(refused) == 3:
                done.set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (len(inside), len(refused)) == (1, 3)


def test_the_store_refuses_a_renewal_of_what_is_another_s_by_now(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = f"{s3}/{uuid.uuid4().hex}/.ke-ray.lock"
    assert storage.create(lock, b"mine")
    assert not storage.replace(lock, b"mine again", b"not mine")
    files = filesystem(lock)[0]
    pipe_file = files.pipe_file

    def overtaken(path: str, data: bytes, **options: object) -> object:
        files.pipe_file = pipe_file
        storage.write_atomic(lock, b"another's")  # between the look and the write
        return pipe_file(path, data, **options)

    monkeypatch.setattr(files, "pipe_file", overtaken)
    assert not storage.replace(lock, b"mine again", b"mine")
    assert storage.read_bytes(lock) == b"another's"

    def lost(path: str, data: bytes, **options: object) -> None:
        files.pipe_file = pipe_file
        pipe_file(path, data, **options)
        raise OSError("the answer is lost")

    monkeypatch.setattr(files, "pipe_file", lost)
    assert storage.replace(lock, b"mine again", b"another's")
    assert storage.read_bytes(lock) == b"mine again"


def test_whose_lease_was_taken_over_is_told_before_it_writes() -> None:
    lock = f"memory://locks/{uuid.uuid4().hex}/.ke-ray.lock"
    other = json.dumps({"ke_ray": "lock", "token": "other", "renewed_at": 0.0}).encode()
    with sole_writer(lock, "out"):
        confirm_lease(lock, "out")
        storage.write_atomic(lock, other)
        with pytest.raises(ResultsError, match="took over 'out'"):
            confirm_lease(lock, "out")
    confirm_lease(lock, "out")


def test_a_store_that_is_away_in_the_end_does_not_hide_why_a_command_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = f"memory://locks/{uuid.uuid4().hex}"

    def away(*_: object) -> None:
        raise StorageError("Cannot reach the store: 503.")

    def command() -> None:
        with claimed(folder, "scan"):
            monkeypatch.setattr("ke_ray.storage.sole_writer._read", away)
            monkeypatch.setattr("ke_ray.storage.ownership._foreign_names", away)
            raise StoreOutageError("Finished work is saved.")

    with pytest.raises(StoreOutageError, match="Finished work is saved"):
        command()


def test_a_file_system_without_locks_gets_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)
    lock = str(tmp_path / "out" / ".ke-ray.lock")
    with sole_writer(lock, "out"):
        assert "expires after 60 s" in str(in_thread(lambda: take(lock)))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("base", ["{tmp}", "memory://locks/{id}"])
def test_what_is_no_lock_of_ours_is_left_as_it_is(base: str, tmp_path: Path) -> None:
    lock = f"{base.format(tmp=tmp_path, id=uuid.uuid4().hex)}/.ke-ray.lock"
    storage.write_atomic(lock, b"somebody's notes")
    with pytest.raises(ResultsError, match="is not a lock file of ke-ray"):
        take(lock)
    assert storage.read_bytes(lock) == b"somebody's notes"
