"""A tiny pretrained series."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny pretraining."""
    from tiny_studies import tiny_pretrain

    from ke_ray.training.pretrain import run_pretrain

    folder = tmp_path_factory.mktemp("series")
    run_pretrain(tiny_pretrain(folder))
    return folder
