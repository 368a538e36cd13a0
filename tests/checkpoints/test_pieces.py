"""Files that arrive in ranges: at once, resumed after a kill, from servers of every kind."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_site import QUICK
from file_host import FileHost, serving, sha256

from ke_ray.checkpoints.hub import HubFile, download_files
from ke_ray.checkpoints.pieces import CONNECTIONS, arrived_bytes
from ke_ray.checkpoints.retries import RetryPolicy
from ke_ray.checkpoints.transfer import download, fetch_file
from ke_ray.errors import CheckpointError

MIB = 2**20
PATIENT = RetryPolicy(timeout_s=120)
SIZE = 20 * MIB + 12_345  # pieces of 8, 8 and a little more than 4 MiB
FETCH = (
    "import sys\n"
    "from pathlib import Path\n"
    "from ke_ray.checkpoints.transfer import fetch_file\n"
    "fetch_file(sys.argv[1], Path(sys.argv[2]))\n"
)


@pytest.fixture
def host() -> Iterator[FileHost]:
    with serving({"weights": SIZE}) as running:
        yield running


def answers(host: FileHost, *those: str) -> None:
    """Answer the first requests so, and the rest as usual."""
    turns = itertools.chain(those, itertools.repeat(""))
    host.answer = lambda: next(turns)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranges_arrive_over_several_connections_at_once(host: FileHost, tmp_path: Path) -> None:
    host.files["weights"] = 9 * 8 * MIB
    gate, turns = threading.Barrier(CONNECTIONS), itertools.count()

    def answer() -> str:
        if 1 <= next(turns) <= CONNECTIONS:  # the first one is alone: it learns the size
            gate.wait(120)  # no other is answered before all have asked
        return ""

    host.answer = answer
    found = fetch_file(f"{host.url}/weights", tmp_path / "x", policy=PATIENT, hashed=True)
    assert found == sha256("weightsone", host.files["weights"]) == digest(tmp_path / "x")
    pieces = [(8 * n * MIB, 8 * (n + 1) * MIB) for n in range(9)]
    assert sorted(asked for asked in host.ranges if asked) == pieces
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_fetch_loses_a_hundredth_at_most(host: FileHost, tmp_path: Path) -> None:
    host.files["weights"] = size = 64 * MIB
    host.pause_at = size // 2
    url, target = f"{host.url}/weights", tmp_path / "x"
    partial = tmp_path / "x.incomplete"
    command = [sys.executable, "-c", FETCH, url, str(target)]
    with subprocess.Popen(command) as process:
        wait_for(lambda: host.num_sent >= size // 2 and len(host.ranges) == CONNECTIONS)
        wait_for(lambda: host.num_sent - arrived_bytes(partial) <= size // 100)
        process.kill()
    arrived = arrived_bytes(partial)
    host.ranges.clear()
    host.go_on.set()
    assert fetch_file(url, target, policy=QUICK, hashed=True) == sha256("weightsone", size)
    assert sum(stop - start for start, stop in filter(None, host.ranges)) == size - arrived


@pytest.mark.parametrize("fault", ["short", "cut", "whole", "endless", "503", "429"])
@pytest.mark.parametrize("turn", [0, 1])
def test_ranges_that_are_answered_otherwise_are_made_up_for(
    host: FileHost, tmp_path: Path, fault: str, turn: int
) -> None:
    answers(host, *[""] * turn, fault)
    found = fetch_file(f"{host.url}/weights", tmp_path / "x", policy=QUICK, hashed=True)
    if (fault, turn) == ("endless", 1):
        assert host.num_sent < 2 * SIZE  # it was left as soon as the range was there
    assert found == sha256("weightsone", SIZE) == digest(tmp_path / "x")


@pytest.mark.parametrize("fault", ["html", "shifted", "unsaid", "404"])
def test_ranges_that_are_wrong_are_one_message_and_what_arrived_is_kept(
    host: FileHost, tmp_path: Path, fault: str
) -> None:
    messages = {"html": "web page", "shifted": "were requested", "unsaid": "which bytes"}
    answers(host, "", *[fault] * 9)
    url, target = f"{host.url}/weights", tmp_path / "x"
    with pytest.raises(CheckpointError, match=messages.get(fault, "HTTP 404")) as caught:
        fetch_file(url, target, policy=QUICK)
    assert str(caught.value).startswith(f"Cannot fetch {url}: ")
    assert "same command again" in str(caught.value)
    host.answer = lambda: ""
    host.ranges.clear()
    assert fetch_file(url, target, policy=QUICK, hashed=True) == sha256("weightsone", SIZE)


def test_a_web_page_is_never_a_file(host: FileHost, tmp_path: Path) -> None:
    host.answer = lambda: "html"
    with pytest.raises(CheckpointError, match="web page"):
        download(f"{host.url}/weights", tmp_path / "x", policy=QUICK)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_changes_between_ranges_is_fetched_anew(
    host: FileHost, tmp_path: Path, heeds_if_range: bool
) -> None:
    turns = itertools.count()

    def answer() -> str:
        if next(turns) == 2:
            host.version = "two"
        return ""

    host.answer = answer
    host.heeds_if_range = heeds_if_range
    found = fetch_file(f"{host.url}/weights", tmp_path / "x", policy=QUICK, hashed=True)
    assert found == sha256("weightstwo", SIZE) == digest(tmp_path / "x")


def test_a_file_that_never_stays_the_same_is_one_message(host: FileHost, tmp_path: Path) -> None:
    turns = itertools.count()

    def answer() -> str:
        host.version = str(next(turns))
        return ""

    host.answer = answer
    with pytest.raises(CheckpointError, match="has changed meanwhile"):
        fetch_file(f"{host.url}/weights", tmp_path / "x", policy=QUICK)


def test_without_ranges_or_versions_there_is_one_connection(host: FileHost, tmp_path: Path) -> None:
    host.version = ""
    answers(host, "", "cut")
    found = fetch_file(f"{host.url}/weights", tmp_path / "x", policy=QUICK, hashed=True)
    assert found == sha256("weights", SIZE)
    host.version, host.answer = "one", lambda: "whole"
    host.ranges.clear()
    found = fetch_file(f"{host.url}/weights", tmp_path / "y", policy=QUICK, hashed=True)
    assert (found, host.ranges) == (sha256("weightsone", SIZE), [None])


def test_a_note_of_another_version_or_a_damaged_one_is_not_gone_on_from(
    host: FileHost, tmp_path: Path
) -> None:
    url, target, note = f"{host.url}/weights", tmp_path / "x", tmp_path / "x.incomplete.json"
    for damage in ("", "{", '{"tag": 1}', "pieces", None):
        answers(host, "", "", "404")
        with pytest.raises(CheckpointError):
            fetch_file(url, target, policy=QUICK)
        if damage is None:
            host.version = "two"
        elif damage == "pieces":  # as if a part in the middle had arrived, that has not
            left = json.loads(note.read_text())
            note.write_text(json.dumps(left | {"pieces": [left["pieces"][0], left["pieces"][2]]}))
        else:
            note.write_text(damage)
    assert fetch_file(url, target, policy=QUICK, hashed=True) == sha256("weightstwo", SIZE)


def test_a_larger_file_than_allowed_is_refused_before_it_arrives(
    host: FileHost, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="more than 16,000,000 bytes"):
        fetch_file(f"{host.url}/weights", tmp_path / "x", policy=QUICK, max_bytes=16_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_what_the_hub_states_is_not_kept(host: FileHost, tmp_path: Path) -> None:
    stated = HubFile("model.safetensors", SIZE, f"sha256:{'0' * 64}", "weights")
    with pytest.raises(CheckpointError, match=r"weights has .* but the Hub states .* 0{64}"):
        download_files("org/lm", "c0ffee", [stated], tmp_path, endpoint=host.url, policy=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_fetched_stops_the_others(host: FileHost, tmp_path: Path) -> None:
    host.files["other"] = 64 * MIB
    host.pause_at = 9 * MIB  # the other one never ends by itself
    files = [HubFile(name, host.files.get(name, SIZE), "git:0", name) for name in ("other", "gone")]
    with pytest.raises(CheckpointError, match="no 'org/lm' at 'c0ffee' .gone."):
        download_files("org/lm", "c0ffee", files, tmp_path, endpoint=host.url, policy=QUICK)
    assert host.num_sent < host.files["other"]
    assert not (tmp_path / "other").exists()
