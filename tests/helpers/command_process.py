"""``ke-ray`` in processes of its own that start at once.

They are forked from a server that has imported torch, transformers, Ray and MLflow; a fresh
interpreter takes five to ten seconds of a core over these.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import worker_server

from ke_ray.engine.cluster import session

_PRELOADED = (
    *("torch", "transformers", "ray", "mlflow", "pandas", "pyarrow.parquet"),
    *("ke_ray.cli", "ke_ray.training.tracking", "ke_ray.training.loop"),
)


def forkserver() -> ForkServerContext:
    """The context whose processes are forked from the server."""
    # Ray reads these when it is imported.
    os.environ.update({k: v for k, v in session._ENVIRONMENT.items() if k not in os.environ})
    worker_server.use_worker_server()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def start_process(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process forked from the server; ``target`` is a function of an importable module."""
    process = forkserver().Process(target=target, args=args, daemon=True)
    process.start()
    return process


@dataclass
class Command:
    """A command under way or at its end, and the file of what it printed."""

    process: ForkServerProcess
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, −N of one that ended by signal N, None of one under way."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 300.0) -> int:
        """The exit code; a command that takes longer is killed and fails the test."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"no end within {timeout_s} s:\n{self.stdout}{self.stderr}")
        return self.process.exitcode


def start_command(
    arguments: Sequence[object],
    out: Path,
    err: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Command:
    """Start ``ke-ray ARGUMENTS…``.

    Args:
        out: file for standard output.
        err: file for standard error; default: that of standard output.
        environment: default: this process's without ``RAY_ADDRESS``, one thread.
    """
    err = err or out
    if environment is None:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"OMP_NUM_THREADS": "1"}
    words = [str(argument) for argument in arguments]
    environment = worker_server.variables() | environment
    process = start_process(_run, words, str(out), str(err), dict(environment), cwd)
    return Command(process, out, err)


def run_command(
    arguments: Sequence[object], folder: Path, *, timeout_s: float = 300.0, **keys: Any
) -> Command:
    """``ke-ray ARGUMENTS…`` at its end, with what it printed in files in ``folder``."""
    command = start_command(arguments, folder / "out.txt", folder / "err.txt", **keys)
    command.wait(timeout_s)
    return command


def _run(
    arguments: list[str], out: str, err: str, environment: dict[str, str], cwd: Path | None
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path in ((1, out), (2, err)):
        Path(path).write_bytes(b"")
        descriptor = os.open(path, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from ke_ray.cli import main

    worker_server.use_worker_server(start=False)
    torch.set_num_threads(1)
    sys.argv = ["ke-ray", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which forked processes leave out
