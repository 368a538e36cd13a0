"""Cost: the numbers of ``--dry-run``, as numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ke_ray.config import load_study
from ke_ray.planning import scan_forecast, sweep_forecast, training_forecast
from ke_ray.planning.cost import cost_of
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import load_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"


def test_a_sweep_costs_what_its_dry_run_says() -> None:
    study = load_sweep(SWEEPS / "table1.yaml")
    cost, text = cost_of(study), sweep_forecast.forecast(study)
    # 1,600 steps in 16 trials and 4,800 in 4, but for batch 2,048: 100 steps of 16 times as much.
    assert cost.num_tokens == (16 + 3 * 4) * 204_800 * 1024
    assert cost.h100_hours == pytest.approx(6e9 * cost.num_tokens / (0.4 * 989e12) / 3600)
    assert (cost.num_checkpoints, cost.bytes_to_fetch) == (4, 4 * 4 * 10**9)
    assert "bytes to fetch: about 16,000,000,000 (4 checkpoints" in text
    assert f"training tokens: about {cost.num_tokens:,}" in text
    assert f"{cost.h100_hours:,.0f} on one H100" in text


def test_a_scan_costs_what_its_dry_run_says(
    scan_study: Callable[..., ScanStudy], series: Path
) -> None:
    study = scan_study(num_instances=10**9, sequence_length=24)
    cost, text = cost_of(study), scan_forecast.forecast(study)
    assert f"checkpoints: {cost.num_checkpoints} " in text
    assert f"tokens to score: {cost.num_tokens:,} " in text
    assert cost.bytes_to_fetch == 0
    (hours,) = re.findall(r": (\S+) on 1 \(", text)
    assert cost.h100_hours == pytest.approx(float(hours), rel=0.01)


def test_continual_learning_costs_what_its_dry_run_says(tmp_path: Path, series: Path) -> None:
    overrides = [f"starts.spec={series}", "starts.nearest=[]", "starts.spread=2", "seeds=[0,1]"]
    study = load_study(
        SWEEPS / "olmo_1b_pubmed.yaml", ContinualStudy, [*overrides, f"output={tmp_path}"]
    )
    cost, text = cost_of(study), training_forecast.forecast(study)
    assert cost.num_tokens == 2 * 2 * 204_800 * 1024
    assert "runs: 4\n" in text
    assert "bytes to fetch: 0 (0 checkpoints)" in text
    assert f"training tokens: about {cost.num_tokens:,} in all" in text
    assert cost.h100_hours is not None
    assert f"{cost.h100_hours:.3g} on one H100" in text
