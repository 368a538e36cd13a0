"""Hosts on one machine that share nothing but a wire, made of Linux namespaces.

Every host has a network, mounts, processes, shared memory and a hostname of its own, and a copy of
the checkout. Its files are its own where programs write: the folder for temporary files, the home
folder, ``/run``, ``/mnt``; the rest of the machine is seen read-only. A switch in a network of its
own connects the hosts; the machine's network is not touched.

Nothing that a lab makes has a name outside of it. Its processes live in one process namespace, its
files in the memory of one mount namespace, its wires in network namespaces that only they hold. So
all of it is gone with the lab's first process, which the kernel ends with the thread that started
it, however that one ends.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
SHIPPED = ("ke_ray", "sweeps", "jobs", "dashboards", "constraints.txt", "pyproject.toml")
_NAMESPACES = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--propagation", "private")

# The outer process number, which /proc still has, and then nothing but reaping orphans.
_SAY_PID = "read -r pid _ < /proc/self/stat; echo $pid"
_REAP = "exec env --ignore-signal=CHLD sleep infinity"

# What is outside of the switch is unreachable at once: Ray asks the default route for its address.
_SWITCH = f"""
set -e
ip link set lo up
ip link add br0 type bridge
ip addr add {NETWORK}.254/24 dev br0
ip link set br0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
ip route add unreachable default
mount -t tmpfs tmpfs /run
mkdir /run/kept /run/disks
number=0
for path in "$@"; do
  mkdir /run/kept/$number
  mount --rbind "$path" /run/kept/$number
  number=$((number + 1))
done
echo '127.0.0.1 localhost' > /run/names
echo 'nameserver 127.0.0.1' > /run/resolver  # refuses; gRPC waits for minutes for a silent one
{_SAY_PID}
{_REAP}
"""

# Arguments: name, address, the number of own folders, those, and the folders that are kept.
_HOST = f"""
set -e
name=$1 address=$2 own=$3; shift 3
{_SAY_PID}
read -r _  # until the wire is there
hostname "$name"
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via {NETWORK}.254
while [ "$own" -gt 0 ]; do
  mkdir -p "/run/disks/$name$1"
  mount --bind "/run/disks/$name$1" "$1"
  own=$((own - 1)); shift
done
number=0
for path in "$@"; do
  mkdir -p "$path"
  mount --bind /run/kept/$number "$path"
  mount -o remount,bind,ro "$path"
  number=$((number + 1))
done
mount --bind /run/names /etc/hosts
resolver=$(readlink -m /etc/resolv.conf)  # a link into /run where systemd resolves names
[ ! -e "$resolver" ] || mount --bind /run/resolver "$resolver"
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t proc proc /proc
mount -o remount,bind,ro /
mount -t tmpfs -o size=64m tmpfs /run
[ -e "$resolver" ] || mkdir -p "$(dirname "$resolver")"
[ -e "$resolver" ] || echo 'nameserver 127.0.0.1' > "$resolver"
echo ready
{_REAP}
"""


@cache
def why_not() -> str:
    """Why this machine can have no lab; empty where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts of namespaces need Linux and root"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter", "setpriv") if not _which(name)]
    if missing:
        return f"hosts of namespaces need {', '.join(missing)} (iproute2, util-linux)"
    probe = "ip link add br0 type bridge && ip link add h1 type veth && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return f"hosts of namespaces were refused: {tried.stderr.strip()}" if tried.returncode else ""


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass
class Host:
    """A host and how to reach it; off where ``process`` has ended.

    Attributes:
        address: on the switch.
        environment: of what runs on it.
        pid: of its first process, as the machine counts; its files are below ``/proc/PID/root``.
    """

    name: str
    address: str
    environment: dict[str, str]
    pid: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def is_on(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def network(self) -> Path:
        """The network namespace, for a relay from the machine's loopback."""
        return Path(f"/proc/{self.pid}/ns/net")

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """One of its files, for this process."""
        return Path(f"/proc/{self.pid}/root{Path(inside).absolute()}")

    def words(self, command: Sequence[object]) -> list[str]:
        """The command line that runs a command there, in the checkout."""
        assert self.is_on, f"{self.name} is off"
        enter = ["nsenter", "--target", str(self.pid), "--all", f"--wdns={ROOT}", "--"]
        # nsenter's end is that of the command too.
        return [*enter, "setpriv", "--pdeathsig", "KILL", *(str(word) for word in command)]

    def start(
        self, command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A command in the background, what it prints in a file of this machine."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.words(command),
                env=self.environment | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(
        self, *command: object, environment: Mapping[str, str] | None = None, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """A command at its end."""
        return subprocess.run(
            self.words(command),
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )


@dataclass
class Lab:
    """A switch and the hosts on it; a context manager."""

    hosts: dict[str, Host] = field(default_factory=dict)

    def __enter__(self) -> Lab:
        assert not why_not(), why_not()
        self._own, self._kept = _folders()
        self._process = subprocess.Popen(
            # The signal outlives the change of program; it comes when the parent's thread is gone.
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES),
                *("sh", "-c", _SWITCH, "switch", *self._kept),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline() or "0")
        assert self.pid, "the switch did not come up; its error is above"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # the lab's first process goes with it, and then everything
        self._process.wait()
        for host in self.hosts.values():
            if host.process is not None:
                host.process.wait(60)

    def add(self, name: str) -> Host:
        """A new host with a copy of the checkout, switched on."""
        number = int(name[1:]) if name[1:].isdigit() else 101 + len(self.hosts)
        host = Host(name, f"{NETWORK}.{number}", _environment())
        disk = self._disk(name)
        for shipped in SHIPPED:
            source, target = ROOT / shipped, disk / ROOT.relative_to("/") / shipped
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, target)
        with Path(f"/proc/{self.pid}/root/run/names").open("a") as names:
            names.write(f"{host.address} {name}\n")
        self.hosts[name] = host
        self.boot(name)
        return host

    def boot(self, name: str) -> None:
        """Switch a host on, with the files that it had."""
        host = self.hosts[name]
        assert not host.is_on, f"{name} is on"
        host.process = subprocess.Popen(
            [
                *("nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--"),
                *("unshare", "--uts", "--ipc", *_NAMESPACES, "sh", "-c", _HOST, "host"),
                *(name, host.address, str(len(self._own)), *self._own, *self._kept),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said, told = host.process.stdout, host.process.stdin
        assert said is not None
        assert told is not None
        host.pid = int(said.readline())
        # The address of its card stays, or the others would look for the old one for a minute.
        card = f"02:00:00:00:01:{int(host.address.rpartition('.')[2]):02x}"
        peer = f"peer name eth0 address {card} netns {host.pid}"
        self._switch(f"ip link add name {name} type veth {peer}")
        self._switch(f"ip link set {name} master br0 up")
        told.write("\n")
        told.flush()
        assert said.readline() == "ready\n", host.process.communicate()[1]

    def kill(self, name: str) -> None:
        """Power loss: its processes end at once and say nothing more; its files stay."""
        host = self.hosts[name]
        assert host.process is not None
        self._switch(f"ip link del {name}")  # first: a host without power closes no connection
        os.kill(host.pid, signal.SIGKILL)
        host.process.wait(60)

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch."""
        self._switch(f"ip link set {name} down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        self._switch(f"ip link set {name} up")

    def part(self, sender: str, receiver: str) -> None:
        """What one host sends to another is lost without a word; the other way it is not."""
        self._neighbour(sender, receiver, "replace", "lladdr 02:00:00:00:00:01 nud permanent")

    def rejoin(self, sender: str, receiver: str) -> None:
        """End ``part``."""
        self._neighbour(sender, receiver, "del")

    def rate(self, name: str, rate: str | None) -> None:
        """Limit what goes to a host and what comes from it, as ``1mbit``; None: no limit."""
        limit = f"tbf rate {rate} burst 32kbit latency 500ms"
        for network, device in ((self.pid, name), (self.hosts[name].pid, "eth0")):
            words = f"replace dev {device} root {limit}" if rate else f"del dev {device} root"
            self._switch(f"tc qdisc {words}", network)

    def _neighbour(self, sender: str, receiver: str, verb: str, more: str = "") -> None:
        source, target = self.hosts[sender], self.hosts[receiver]
        self._switch(f"ip neigh {verb} {target.address} dev eth0 {more}", source.pid)

    def _switch(self, command: str, network: int | None = None) -> None:
        enter = ["nsenter", "--target", str(network or self.pid), "--net", "--"]
        done = subprocess.run(
            [*enter, *shlex.split(command)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _disk(self, name: str) -> Path:
        return Path(f"/proc/{self.pid}/root/run/disks/{name}")


def _folders() -> tuple[list[str], list[str]]:
    """The folders that each host has for itself, and those in them that all see: Python's."""
    own = {"/tmp", "/mnt", "/var/tmp", tempfile.gettempdir(), str(Path.home()), str(ROOT)}
    python = {sys.prefix, sys.base_prefix, *sys.path}
    kept = {
        str(path)
        for path in (Path(entry).resolve() for entry in python if entry)
        if path.is_dir()
        and any(path.is_relative_to(folder) for folder in own)
        and (not path.is_relative_to(ROOT) or path.is_relative_to(sys.prefix))
        and not ROOT.is_relative_to(path)
    }
    return sorted(folder for folder in own if Path(folder).is_dir()), _outermost(kept)


def _outermost(paths: set[str]) -> list[str]:
    return sorted(path for path in paths if not any(str(up) in paths for up in Path(path).parents))


def _environment() -> dict[str, str]:
    """Nothing of ours but the way to Python, as in an activated virtual environment."""
    return {
        "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(Path.home()),
        "LANG": "C.UTF-8",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
