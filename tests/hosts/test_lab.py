"""The laboratory is what it says: hosts apart, faults that are faults, and nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import ROOT, Host, Lab, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

_ECHO = """
import socket
server = socket.create_server(("0.0.0.0", 7))
print("listening", flush=True)
while True:
    client = server.accept()[0]
    while data := client.recv(65536):
        client.sendall(data)
"""
_ASK = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 7))
started, missing = time.monotonic(), 100_000
link.sendall(b"x" * missing)
while missing:
    missing -= len(link.recv(65536))
print(time.monotonic() - started)
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    with Lab() as lab:
        lab.add("h1")
        lab.add("h2")
        yield lab


@pytest.fixture
def echo(pair: Lab, tmp_path: Path) -> Iterator[Host]:
    """The second host with a server that says everything again."""
    server = pair.hosts["h2"].start(["python", "-c", _ECHO], tmp_path / "echo.log")
    while "listening" not in (tmp_path / "echo.log").read_text():
        assert server.poll() is None, (tmp_path / "echo.log").read_text()
        time.sleep(0.05)
    yield pair.hosts["h2"]
    server.kill()
    server.wait()


def asked(lab: Lab, seconds: float = 100) -> float:
    """How long the answer to 100 kB took; infinite where there was none."""
    answer = lab.hosts["h1"].run(
        *("timeout", seconds, "python", "-c", _ASK, lab.hosts["h2"].address)
    )
    return float(answer.stdout or "inf")


def test_hosts_share_no_files_names_processes_or_addresses(pair: Lab) -> None:
    first, second = pair.hosts["h1"], pair.hosts["h2"]
    for place in ("/tmp", "/mnt", "/dev/shm", "/run", ROOT, Path.home()):
        assert first.run("touch", f"{place}/mine").returncode == 0, place
        assert first.path(f"{place}/mine").exists()
        assert not second.path(f"{place}/mine").exists()
        assert not Path(f"{place}/mine").exists()
    assert first.run("touch", "/usr/mine").returncode == 1, "the rest of the machine is read-only"
    assert first.run("hostname").stdout == "h1\n"
    assert len(first.run("sh", "-c", "echo /proc/[0-9]*").stdout.split()) == 2
    links = first.run("ip", "-brief", "address").stdout
    assert {line.split("@")[0].split()[0] for line in links.splitlines()} == {"lo", "eth0"}
    assert first.address in links
    where = first.run("python", "-c", "import ke_ray; print(ke_ray.__file__)").stdout
    assert where == f"{ROOT}/ke_ray/__init__.py\n"
    outside = "import socket; socket.create_connection(('1.1.1.1', 80))"
    assert "No route to host" in first.run("python", "-c", outside).stderr
    names = os.listdir("/sys/class/net")
    assert not {"br0", "h1", "h2"} & set(names), "the machine's network was touched"


def test_a_cut_and_a_one_way_part_are_silent_and_end(pair: Lab, echo: Host) -> None:
    assert asked(pair) < float("inf")
    for break_it, mend_it in (
        (lambda: pair.cut("h2"), lambda: pair.mend("h2")),
        (lambda: pair.part("h1", "h2"), lambda: pair.rejoin("h1", "h2")),
        (lambda: pair.part("h2", "h1"), lambda: pair.rejoin("h2", "h1")),
    ):
        break_it()
        assert asked(pair, 2) == float("inf")
        mend_it()
        assert asked(pair) < float("inf")


def test_a_rate_holds_both_ways(pair: Lab, echo: Host) -> None:
    pair.rate("h2", "1mbit")
    assert asked(pair) > 2 * (100_000 - 2 * 32_000) * 8 / 1e6  # 32 kbit pass at once, each way
    assert "tbf" in echo.run("tc", "qdisc").stdout
    pair.rate("h2", None)
    assert "tbf" not in echo.run("tc", "qdisc").stdout


def test_power_loss_ends_all_processes_and_keeps_the_files(pair: Lab, tmp_path: Path) -> None:
    host = pair.hosts["h2"]
    host.run("touch", "/tmp/kept", "/dev/shm/lost")
    sleeper = host.start(["sleep", "600"], tmp_path / "log")
    pair.kill("h2")
    sleeper.wait(60)
    assert not host.is_on
    pair.boot("h2")
    assert host.path("/tmp/kept").exists()
    assert not host.path("/dev/shm/lost").exists()


_RUN = """
import sys, time
from lab import Lab
with Lab() as lab:
    print(lab.pid, lab.add("h1").pid, flush=True)
    lab.hosts["h1"].run("sh", "-c", "sleep 600 & sleep 600")
"""


def test_a_killed_test_run_leaves_nothing() -> None:
    mounts, links = Path("/proc/mounts").read_text(), os.listdir("/sys/class/net")
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert run.stdout is not None
    switch, host = map(int, run.stdout.readline().split())
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in (switch, host)}
    assert len(spaces) == 2
    while len(_living_in(spaces)) < 5:
        time.sleep(0.05)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while left := _living_in(spaces):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert Path("/proc/mounts").read_text() == mounts
    assert os.listdir("/sys/class/net") == links


def _living_in(spaces: set[str]) -> list[str]:
    """Processes in process namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns" / "pid") in spaces:
                found.append((entry / "cmdline").read_text())
        except OSError:  # it has just ended
            continue
    return found


def test_the_shell_takes_commands_and_survives_wrong_ones(
    pair: Lab, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from lab_cluster import LabCluster
    from lab_shell import LabShell
    from ray_head import Head

    shell = LabShell(LabCluster(pair, Head("", "", "", tmp_path)))
    shell.cmdqueue = ["on h1 hostname", "cut nobody", "rate h1", "kill h2", "hosts", "quit"]
    shell.cmdloop()
    said = capfd.readouterr().out
    assert "h1\n" in said
    assert said.count("That did not work") == 2
    assert any(line.split() == ["h2", "10.77.0.2", "off"] for line in said.splitlines())
    pair.boot("h2")
