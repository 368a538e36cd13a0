"""The documentation site, built once a session as `make docs` builds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_site(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build what is in ``folder/build/docs``; the site is ``folder/build/site``."""
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources in ``build/docs`` and the site in ``build/site``; read only."""
    folder = tmp_path_factory.mktemp("site")
    sources = [sys.executable, str(ROOT / "docs" / "site" / "sources.py"), "build/docs"]
    subprocess.run(sources, cwd=folder, check=True, capture_output=True)
    built = build_site(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder
