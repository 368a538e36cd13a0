"""ke_ray from its wheel, in an environment without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Installed:
    """An environment with the wheel, beside the packages of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder / "dist")]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (self.wheel,) = (folder / "dist").glob("*.whl")
        (self.sdist,) = (folder / "dist").glob("*.tar.gz")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps"]
        subprocess.run([*pip, "--no-index", str(self.wheel)], check=True, capture_output=True)
        # What ke_ray needs is here already. A .pth file of a folder that a .pth file names is not
        # read, so the checkout that is installed here in place cannot be imported there.
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (packages / "others.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")

    def run(
        self,
        folder: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        """``ke-ray`` in a folder; by default in this process's environment, with one thread."""
        return subprocess.run(
            [str(self.folder / "bin" / "ke-ray"), *map(str, arguments)],
            cwd=folder,
            env=environment or {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )

    def runs(self, folder: Path, *arguments: object) -> str:
        """What a command prints that has to end well."""
        done = self.run(folder, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
