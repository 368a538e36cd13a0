"""Result folders with the documented schemas, computed from simulated models.

Nothing is a constant: coefficients are drawn with a spread that grows over "pretraining", and every
measure, leave-one-out value, acquisition and forgetting is computed from what was drawn.
"""

from __future__ import annotations

from pathlib import Path

from synthetic.scan import hash_of, make_scan
from synthetic.training import make_continual, make_pretrain, make_sweep

__all__ = ["hash_of", "make_continual", "make_demo", "make_pretrain", "make_scan", "make_sweep"]


def make_demo(root: Path) -> Path:
    """Everything a demo leaves: pretrain, scan, continual, sweep."""
    make_pretrain(root / "pretrain")
    make_scan(root / "scan")
    make_continual(root / "continual")
    make_sweep(root / "sweep")
    return root
