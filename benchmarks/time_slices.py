"""Two programs on one machine in turn, a few seconds each, so that a drifting machine slows both.

A contender is a process that prints one JSON event a line (``{"event": …, "at": …}``, with
``time.monotonic()``), with all its descendants: for Ray, its daemons and workers. While it is the
other's turn the whole tree is stopped (SIGSTOP): nothing of it runs, on any core. Its clock is the
sum of its turns, so wall time is compared, without the time of the other. What a contender does
before its ``ready`` event is not timed and not sliced.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil


class Contender:
    """One or more Python commands that share their turns.

    Attributes:
        events: what was printed so far, in order of arrival.
    """

    def __init__(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._commands = commands
        self._turns: list[list[float]] = []
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._num_open = len(commands)
        self._cpu: list[tuple[float, float]] = []  # clock, CPU seconds of the tree

    def start(self, timeout_s: float = 180.0) -> None:
        """Start the commands, and stop them when each has printed ``ready``."""
        self._turns.append([time.monotonic(), float("inf")])
        for command in self._commands:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._processes.append(process)
            threading.Thread(target=self._read, args=(process,), daemon=True).start()
        deadline = time.monotonic() + timeout_s
        while sum(e["event"] == "ready" for e in self.events) < len(self._commands):
            self._take(max(0.0, deadline - time.monotonic()))
            if self.is_done or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not become ready")
        self.pause()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"event"'):
                self._lines.put(json.loads(line))
        self._lines.put(None)

    @property
    def is_done(self) -> bool:
        return self._num_open == 0

    def run_for(self, seconds: float) -> None:
        """One turn; it ends early where the contender does."""
        self._signal(signal.SIGCONT)
        self._turns.append([time.monotonic(), float("inf")])
        end = time.monotonic() + seconds
        while not self.is_done and (left := end - time.monotonic()) > 0:
            self._take(left)
        if not self.is_done:
            self.pause()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)
        self._turns[-1][1] = now = time.monotonic()
        self._cpu.append((self.clock(now), sum(map(_cpu_seconds, self._tree()))))

    def clock(self, at: float) -> float:
        """Seconds of own turns up to the moment ``at``."""
        return sum(max(0.0, min(at, end) - start) for start, end in self._turns)

    def cpu_share(self) -> float:
        """CPU seconds for each second of its clock, from ``ready`` to its last full turn."""
        # A process that ends takes its seconds along: the tree is counted while it is whole.
        most = max(range(len(self._cpu)), key=lambda index: self._cpu[index][1])
        (first_clock, first), (last_clock, last) = self._cpu[0], self._cpu[most]
        return (last - first) / (last_clock - first_clock)

    def end(self) -> None:
        """Ask what has not ended by itself to end."""
        self._signal(signal.SIGCONT)
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def _take(self, timeout_s: float) -> None:
        with suppress(queue.Empty):
            event = self._lines.get(timeout=timeout_s)
            if event is None:
                self._num_open -= 1
            else:
                self.events.append(event)

    def _tree(self) -> list[psutil.Process]:
        tree = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                tree += [root, *root.children(recursive=True)]
        return tree

    def _signal(self, number: signal.Signals) -> None:
        """To every process of the tree; again while new ones appear."""
        reached: set[int] = set()
        while True:
            fresh = [process for process in self._tree() if process.pid not in reached]
            if not fresh:
                return
            for process in fresh:
                reached.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def race(contenders: Sequence[Contender], slice_s: float) -> None:
    """Give the contenders turns until all of them are done; whoever is left goes on alone.

    The order is reversed in every second round.
    """
    number = 0
    try:
        for contender in contenders:
            contender.start()
        while any(not contender.is_done for contender in contenders):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                if not contender.is_done:
                    contender.run_for(slice_s)
            number += 1
    finally:
        for contender in contenders:
            contender.end()
