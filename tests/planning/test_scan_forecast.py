"""The figures of ``ke-ray scan --dry-run``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ke_ray.planning.scan_forecast import forecast
from ke_ray.planning.scan_items import FLOPS_PER_S
from ke_ray.studies.scan import ScanStudy


def gpu_hours(text: str) -> dict[int, float]:
    (line,) = [line for line in text.splitlines() if line.startswith("hours on GPUs")]
    return {int(n): float(hours) for hours, n in re.findall(r"(\S+) on (\d+) \(", line)}


def test_hours_on_gpus_follow_from_operations_and_bytes(
    scan_study: Callable[..., ScanStudy], series: Path
) -> None:
    size = (series / "step10" / "model.safetensors").stat().st_size
    text = forecast(scan_study(num_instances=1))
    assert "bytes to fetch: 0" in text
    assert gpu_hours(text)[1] * 3600 == pytest.approx(4 * size / 1e9, rel=0.2), "loads take longest"
    assert gpu_hours(text)[8] == pytest.approx(gpu_hours(text)[1] / 4, rel=0.01)

    many = {"num_instances": 10**9, "sequence_length": 24}
    body, head = 2 * (4 * 32**2 + 3 * 32 * 48), 32 * 128
    alone = gpu_hours(forecast(scan_study(measures=("knowledge_entropy", "gini"), **many)))
    seconds = 4 * 24e9 * 2 * body / FLOPS_PER_S["gpu"]
    assert alone[1] * 3600 == pytest.approx(seconds, rel=0.01)
    assert alone[64] == pytest.approx(alone[1] / 64, rel=0.01)
    every = gpu_hours(forecast(scan_study(**many)))
    assert every[1] / alone[1] == pytest.approx(1.28 * (body + head) / body, rel=0.01)
