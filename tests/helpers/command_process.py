"""``ke-ray`` in processes that start at once: forked from a server that has imported torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tiny_training import start_process


def start_command(arguments: Sequence[object], said: Path) -> ForkServerProcess:
    """Start ``ke-ray ARGUMENTS…``; what it prints goes to the file ``said``."""
    return start_process(_run, [str(argument) for argument in arguments], str(said))


def _run(arguments: list[str], said: str) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from ke_ray.cli import main

    torch.set_num_threads(1)
    sys.argv = ["ke-ray", *arguments]
    main()
