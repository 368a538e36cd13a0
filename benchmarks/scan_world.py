"""The checkpoints, corpora and scans that the parts of ``scanning.py`` share."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from shape import SMALL

SEQUENCE = SMALL.length
MEASURES = ("knowledge_entropy",)
ITEM_S = 6.0
THREADS = 2


def save_checkpoint(folder: Path, seed: int, dtype: str = "float32") -> Path:
    """Random weights in transformers' layout."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    SMALL.model(seed=seed).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def save_corpus(path: Path, num_instances: int) -> Path:
    rows = np.random.default_rng(0).integers(2, SMALL.vocabulary, (num_instances, SEQUENCE))
    np.save(path, rows.astype(np.uint16))
    return path


class Quiet:
    """A scan's progress, unseen."""

    def start(self, **_: Any) -> None:
        pass

    def tokens(self, num_tokens: int) -> None:
        pass

    def checkpoint(self, ref: Any, rows: Sequence[dict[str, Any]]) -> None:
        assert all(row["status"] == "ok" for row in rows), rows

    def stop(self) -> None:
        pass


class Times(Quiet):
    """When checkpoints were finished."""

    def __init__(self) -> None:
        self.done: list[float] = []
        self.started: float = 0.0

    def start(self, **_: Any) -> None:
        self.started = time.monotonic()

    def checkpoint(self, ref: Any, rows: Sequence[dict[str, Any]]) -> None:
        super().checkpoint(ref, rows)
        self.done.append(time.monotonic())


def make_study(spec: str, corpus: str, output: str, **changes: Any) -> Any:
    from ke_ray.studies.scan import ScanStudy

    return ScanStudy.model_validate(
        {
            "checkpoints": {"spec": spec},
            "data": {"corpus": corpus},
            "sequence_length": SEQUENCE,
            "measures": MEASURES,
            "output": output,
            "mlflow": {"enabled": False},
            **changes,
        }
    )


def run_engine(
    spec: str, corpus: str, num_instances: int, num_workers: int, progress: Any, **changes: Any
) -> Any:
    """The real engine, driver and all."""
    from ke_ray.engine.scan.run import run_scan
    from ke_ray.planning.scan import prepare_scan
    from ke_ray.tracking.tracker import Tracker

    changes |= {"num_instances": num_instances, "num_actors": num_workers}
    with tempfile.TemporaryDirectory() as output:
        study = make_study(spec, corpus, output, **changes)
        with Tracker(study.mlflow) as tracker:
            return run_scan(prepare_scan(study), progress, tracker)


def calibrate(folder: Path, corpus: str, threads: int) -> int:
    """Instances that make an item last ``ITEM_S`` with so many threads."""
    import torch

    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_model

    torch.set_num_threads(threads)
    model = load_model(folder)
    ids = torch.from_numpy(np.load(corpus)[:8].astype(np.int64))
    score_model(model, ids[:4], measures=MEASURES)
    spent = []
    for _ in range(3):  # the shortest: other work must not make items too short
        started = time.monotonic()
        score_model(model, ids, measures=MEASURES, batch_size=4)
        spent.append(time.monotonic() - started)
    return max(4, round(ITEM_S * len(ids) / min(spent)))
