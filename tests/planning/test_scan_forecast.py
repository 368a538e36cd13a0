"""The figures of ``ke-ray scan --dry-run``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ke_ray.planning import speed
from ke_ray.planning.scan_forecast import forecast, num_body_parameters
from ke_ray.planning.speed import H100_FLOPS_PER_S, Speed, measured_speed
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
    seconds = 4 * 24e9 * 2 * body / (0.6 * H100_FLOPS_PER_S["float32"])
    assert alone[1] * 3600 == pytest.approx(seconds, rel=0.01)
    assert alone[64] == pytest.approx(alone[1] / 64, rel=0.01)
    every = gpu_hours(forecast(scan_study(**many)))
    assert every[1] / alone[1] == pytest.approx(1.28 * (body + head) / body, rel=0.01)


def test_changed_models_cost_their_passes_over_their_instances_and_a_copy_of_the_weights(
    scan_study: Callable[..., ScanStudy], series: Path
) -> None:
    many = {"num_instances": 10**9, "sequence_length": 24, "intervention_instances": 10**8}
    plain = gpu_hours(forecast(scan_study(measures=("gini",), **many)))
    names = ("gini", "sensitivity_all_0.1", "sensitivity_all_0.2", "masking_most_0.1")
    text = forecast(scan_study(measures=names, noise_seeds=3, **many))
    size = (series / "step10" / "model.safetensors").stat().st_size
    assert "interventions: 9 more passes over 100,000,000 instances" in text
    (copy,) = re.findall(r"up to ([0-9,]+) bytes of original weights", text)
    assert int(copy.replace(",", "")) == pytest.approx(size, rel=0.05)  # less its header
    body, head = 2 * (4 * 32**2 + 3 * 32 * 48), 32 * 128
    factor = 1 + 9 * 0.1 * (body + head) / body
    assert gpu_hours(text)[1] / plain[1] == pytest.approx(factor, rel=0.01)
    assert "interventions" not in forecast(scan_study())


def test_hours_on_gpus_are_those_of_the_studys_dtype(
    scan_study: Callable[..., ScanStudy], series: Path
) -> None:
    many = {"num_instances": 10**9, "sequence_length": 24}
    plain, short = (
        gpu_hours(forecast(scan_study(dtype=dtype, **many))) for dtype in ("float32", "bfloat16")
    )
    assert plain[1] / short[1] == pytest.approx(989 / 67, rel=0.01)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (0.1e12, Speed("CPU", "float32", 2.5e12, 25.0, "bfloat16")),
        (5.0e12, Speed("CPU", "bfloat16", 5.0e12, 1.0, "bfloat16")),
    ],
)
def test_hours_are_not_made_of_a_dtype_that_the_cpu_emulates(
    own: float, expected: Speed, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"float32": 2.5e12, "bfloat16": own}
    monkeypatch.setattr(speed, "_measured", lambda device, dtype: speeds[dtype])
    found = measured_speed("bfloat16", use_gpu=False)
    assert found == expected
    assert ("25.0 times slower" in str(found)) == (own < 2.5e12)
    assert f"measured in {expected.dtype}" in str(found)


def test_the_speed_of_this_machine_is_measured() -> None:
    found = measured_speed("float32", use_gpu=False)
    assert (found.device, found.dtype, found.slowdown) == ("CPU", "float32", 1.0)
    assert found.flops_per_s > 1e8


@pytest.mark.parametrize(
    ("model_type", "memories"),
    [("olmoe", 2 * 12), ("qwen2_moe", 2 * 12 + 20), ("deepseek_v2", 2 * 12 + 2 * 12)],
)
def test_a_token_is_multiplied_with_the_experts_that_it_is_routed_to(
    tiny_decoder, model_type, memories
):
    config = tiny_decoder(model_type).config
    heads = config.num_key_value_heads / 4
    assert num_body_parameters(config) == 2 * (32**2 * (2 + 2 * heads) + 3 * 32 * memories)


def test_the_forecast_is_by_device_and_dtype_and_says_what_is_assumed(
    scan_study: Callable[..., ScanStudy], series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"num_instances": 10**9, "sequence_length": 24}
    auto = forecast(scan_study(dtype="auto", **many))
    assert "hours on GPUs in bfloat16, assumed to reach" in auto
    assert "measured in float32; 60 % of it assumed" in auto  # of the CPU here
    (line,) = [
        line for line in auto.splitlines() if line.startswith("hours of scoring on one H100")
    ]
    assert "assumed" in line
    hours = {name: float(n) for n, name in re.findall(r"(\S+) in ([^,]+)", line)}
    assert list(hours) == ["bfloat16", "float32 with TF32", "float32"]
    assert hours["float32"] / hours["bfloat16"] == pytest.approx(989 / 67, rel=0.01)
    assert gpu_hours(auto)[1] == pytest.approx(hours["bfloat16"], rel=0.01)
    tf32 = forecast(scan_study(matmul_precision="auto", **many))
    assert gpu_hours(tf32)[1] == pytest.approx(hours["float32 with TF32"], rel=0.01)
