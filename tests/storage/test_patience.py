"""A store that goes out of order is waited for; one that refuses or never answered is not."""

from __future__ import annotations

import errno
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from ke_ray import storage
from ke_ray.engine.cluster.session import worker_env
from ke_ray.errors import StorageError, StoreOutageError
from ke_ray.storage import patience
from ke_ray.storage.patience import on_store


class Moody(http.server.BaseHTTPRequestHandler):
    """Answers with the statuses of a list, then with its last one."""

    statuses: list[int]
    asked = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        Moody.asked += 1
        status = Moody.statuses.pop(0) if len(Moody.statuses) > 1 else Moody.statuses[0]
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Moody, "asked", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file"
        server.shutdown()


def test_a_store_that_answered_before_is_waited_for(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    Moody.statuses = [200, 503, 200]
    assert storage.read_bytes(store) == b"ok"
    assert storage.read_bytes(store) == b"ok"
    assert Moody.asked == 3
    assert "out of order" in caplog.text
    assert "answers again" in caplog.text


def test_waiting_has_an_end_and_says_what_to_do(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_RAY_STORE_GIVE_UP_S", "0.5")
    Moody.statuses = [200, 500]
    storage.read_bytes(store)
    with pytest.raises(StoreOutageError, match=r"500.*attempts in.*Finished work is saved") as end:
        storage.read_bytes(store)
    assert end.value.exit_code == 1
    asked = Moody.asked
    with pytest.raises(StoreOutageError):  # and the next operation waits no more
        storage.read_bytes(store)
    assert Moody.asked == asked + 1
    Moody.statuses = [200, 500, 200]
    for _ in range(2):  # until it has answered
        storage.read_bytes(store)
    assert Moody.asked == asked + 4


@pytest.mark.parametrize("statuses", [[503], [200, 403]])
def test_a_store_that_refuses_or_never_answered_is_an_error_at_once(
    store: str, statuses: list[int]
) -> None:
    Moody.statuses = list(statuses)
    for _ in statuses[:-1]:
        storage.read_bytes(store)
    with pytest.raises(StorageError, match="Cannot reach"):
        storage.read_bytes(store)
    assert Moody.asked == len(statuses)


def test_a_full_disk_is_no_outage(store: str) -> None:
    Moody.statuses = [200]
    storage.read_bytes(store)

    def copy() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        on_store(store, copy)


def test_another_thread_that_gave_up_ends_nobody_elses_patience(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_RAY_STORE_GIVE_UP_S", "1.5")
    Moody.statuses = [200, 500]
    storage.read_bytes(store)
    impatient = threading.Timer(0.1, patience._answered.clear)
    impatient.start()
    with pytest.raises(StoreOutageError, match="Finished work is saved"):
        storage.read_bytes(store)
    impatient.join()


def test_workers_wait_for_the_stores_that_their_command_has_reached(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Moody.statuses = [200, 503, 200]
    monkeypatch.setattr(patience, "_answered", {"https://me:secret@other"})
    storage.read_bytes(store)
    monkeypatch.setenv("KE_RAY_STORE_GIVE_UP_S", "77")
    env = worker_env()
    assert env["KE_RAY_STORE_GIVE_UP_S"] == "77"
    assert env[patience.KNOWN_STORES] == store.removesuffix("/file")
    code = "import sys; from ke_ray import storage; print(storage.read_bytes(sys.argv[1]))"
    worker = [sys.executable, "-c", code, store]
    done = subprocess.run(worker, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.stdout == "b'ok'\n", done.stderr
    assert Moody.asked == 3
