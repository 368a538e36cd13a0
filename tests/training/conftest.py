"""Makes the tiny set-ups importable by the tests of this folder, and pretrains a tiny series."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny pretraining."""
    from tiny_studies import tiny_pretrain

    from ke_ray.training.pretrain import run_pretrain

    folder = tmp_path_factory.mktemp("series")
    run_pretrain(tiny_pretrain(folder))
    return folder
