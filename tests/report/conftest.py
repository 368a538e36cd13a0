"""Synthetic result folders shared by the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic


@pytest.fixture(scope="session")
def scan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete scan: eight checkpoints, four layers, two corpora."""
    return synthetic.make_scan(tmp_path_factory.mktemp("results") / "scan")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one result of every kind, a failed trial among them."""
    return synthetic.make_demo(tmp_path_factory.mktemp("runs") / "demo")
