"""Golden values that need no model: coefficients in, entropies, rows and multipliers out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ke_ray.core.entropy import entropy_nats
from ke_ray.core.resuscitation import multipliers, predicted_entropy_nats, select_rows

RATIOS = (0.25, 0.5, 0.75)
FACTORS = (0.5, 1.0, 2.0)


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module", params=["tiny-seed0", "tiny-seed1"])
def golden(request: pytest.FixtureRequest, reference_data: Path) -> Golden:
    folder = reference_data / "golden" / request.param
    values = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    return Golden(load_file(folder / "golden.safetensors"), values, folder)


@pytest.mark.parametrize(
    ("coefficients", "section", "key"),
    [
        ("avg_coefficients_float64", "float64", "knowledge_entropy"),
        ("avg_coefficients_relu_float64", "float64", "knowledge_entropy_relu"),
        (
            "padded.avg_coefficients_masked_instance_mean_float64",
            "float64_padded",
            "knowledge_entropy_masked_instance_mean",
        ),
    ],
)
def test_entropy_of_float64_coefficients(
    golden: Golden, coefficients: str, section: str, key: str
) -> None:
    entropy = entropy_nats(golden.tensors[coefficients])
    expected = golden.values[section][key]
    torch.testing.assert_close(
        entropy, torch.tensor(expected["per_layer"], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert float(entropy.sum()) == pytest.approx(expected["sum"], abs=1e-12)


@pytest.mark.parametrize("name", ["avg_coefficients", "official_avg_act_abs"])
def test_entropy_of_the_authors_float32_files_at_either_scale(golden: Golden, name: str) -> None:
    expected = torch.tensor(golden.values["official"]["entropy_per_layer"], dtype=torch.float64)
    torch.testing.assert_close(entropy_nats(golden.tensors[name]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["avg_coefficients", "official_avg_act_abs"])
def test_selected_rows_are_exact(golden: Golden, name: str, ratio: float) -> None:
    selected = select_rows(golden.tensors[name], ratio)
    assert torch.equal(selected, golden.tensors[f"selected.p{ratio}"].bool())


def test_number_of_selected_rows_for_more_ratios(golden: Golden) -> None:
    for ratio, expected in golden.values["selected_rows_by_p"].items():
        if float(ratio) > 0:
            rows = select_rows(golden.tensors["avg_coefficients_float64"], float(ratio))
            assert rows.sum(dim=-1).tolist() == expected, ratio


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["avg_coefficients", "avg_coefficients_float64"])
def test_multipliers(golden: Golden, name: str, ratio: float, factor: float) -> None:
    result = multipliers(golden.tensors[name], ratio, factor)
    expected = golden.tensors[f"multipliers.p{ratio}_q{factor}"].double()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    assert torch.all(result[golden.tensors[f"selected.p{ratio}"] == 0] == 1.0)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("factor", FACTORS)
def test_scaled_native_weights(golden: Golden, ratio: float, factor: float) -> None:
    """OLMo's fused tensor is [up; gate]: scaling its first m rows gives the recorded sums."""
    state = torch.load(golden.folder / "olmo" / "model.pt", weights_only=True)
    result = multipliers(golden.tensors["avg_coefficients"], ratio, factor)
    m = result.shape[-1]
    layers = golden.values["resuscitation"][f"p{ratio}_q{factor}"]["layers"]
    for layer, expected in enumerate(layers):
        fused = state[f"transformer.blocks.{layer}.ff_proj.weight"]
        scaled = fused.clone()
        scaled[:m] *= result[layer, :, None].float()
        sums = scaled.double()
        # The signed sum nearly cancels, so its error is relative to the sum of magnitudes.
        assert float(sums.sum()) == pytest.approx(expected["sum"], abs=1e-6 * expected["abs_sum"])
        assert float(sums.abs().sum()) == pytest.approx(expected["abs_sum"], rel=1e-5)
        assert float(sums.square().sum()) == pytest.approx(expected["sq_sum"], rel=1e-5)
        changed = (scaled != fused).any(dim=-1).nonzero()[:, 0]
        selected = result[layer][select_rows(golden.tensors["avg_coefficients"], ratio)[layer]]
        assert len(changed) == expected["rows_changed"]
        assert len(selected) == expected["rows_selected"]
        assert (int(changed.min()), int(changed.max())) == (
            expected["min_row"],
            expected["max_row"],
        )
        assert float(selected.min()) == pytest.approx(expected["multiplier_min"], rel=1e-5)
        assert float(selected.max()) == pytest.approx(expected["multiplier_max"], rel=1e-5)
        name = f"resuscitated.p{ratio}_q{factor}.transformer.blocks.{layer}.ff_proj.weight"
        if name in golden.tensors:
            torch.testing.assert_close(scaled, golden.tensors[name], rtol=1e-5, atol=0)


def test_prediction_is_exact_in_the_first_layer_and_only_there(golden: Golden) -> None:
    """Measured by the authors' script on the resuscitated model; layer 0 has unchanged inputs."""
    coefficients = golden.tensors["avg_coefficients_float64"]
    result = multipliers(coefficients, 0.5, 2.0)
    measured = golden.tensors["resuscitated.p0.5_q2.0.avg_coefficients"].double()
    torch.testing.assert_close(coefficients[0] * result[0], measured[0], rtol=1e-5, atol=0)
    predicted = predicted_entropy_nats(coefficients, result)
    official = golden.values["resuscitated_p0.5_q2.0_official"]["entropy_per_layer"]
    assert float(predicted[0]) == pytest.approx(official[0], abs=1e-5)
    assert abs(float(predicted[1]) - official[1]) > 1e-5
