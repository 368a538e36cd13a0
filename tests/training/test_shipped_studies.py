"""The studies in ``sweeps/`` of this kind say what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from ke_ray.config import load_study
from ke_ray.studies.continual import ALL_TASKS, ContinualStudy
from ke_ray.studies.training import PretrainStudy

SWEEPS = Path(__file__).parents[2] / "sweeps"


@pytest.mark.parametrize(
    ("overrides", "steps", "every"),
    [
        ([], 1600, 160),
        (["global_batch_size=2048"], 100, 10),
        (["epochs=3"], 4800, 160),
        (["optimizer.learning_rate=1e-3"], 1600, 160),
        (["optimizer.learning_rate=1e-4"], 1600, 160),
    ],
)
def test_the_papers_baseline_and_its_variants(overrides: list[str], steps: int, every: int) -> None:
    study = load_study(SWEEPS / "olmo_1b_pubmed.yaml", ContinualStudy, overrides)
    assert study.corpus.num_instances is not None
    assert study.injection is not None
    per_epoch = study.corpus.num_instances // study.global_batch_size
    assert study.epochs * per_epoch == steps
    assert per_epoch // (study.injection.count or 0) == every
    assert study.schedule.num_warmup_steps(1600) == 80
    assert study.optimizer.betas == (0.9, 0.95)
    assert study.optimizer.eps == 1e-5
    assert study.downstream is not None
    assert set(study.downstream.tasks) == set(ALL_TASKS)


def test_the_demo_pretrains_at_least_eight_spaced_checkpoints() -> None:
    study = load_study(SWEEPS / "demo_pretrain.yaml", PretrainStudy)
    assert len(study.checkpoint_steps) >= 8
    assert study.checkpoint_steps[-1] == study.num_steps
    gaps = [b - a for a, b in zip(study.checkpoint_steps, study.checkpoint_steps[1:], strict=False)]
    assert gaps == sorted(gaps)


def test_the_demo_continues_from_what_the_demo_pretrained() -> None:
    pretrain = load_study(SWEEPS / "demo_pretrain.yaml", PretrainStudy)
    study = load_study(SWEEPS / "demo_continual.yaml", ContinualStudy)
    assert study.starts.spec.startswith(pretrain.output)
    assert study.starts.spread == 3
    assert study.sequence_length <= pretrain.sequence_length
    assert study.downstream is not None
    assert study.downstream.own_tasks
