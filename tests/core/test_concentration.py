from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ke_ray.core.concentration import (
    dormant_share,
    gini,
    participation_ratio,
    top_k,
    top_k_mass,
)
from ke_ray.errors import UserError

ALL: list[Callable[[Tensor], Tensor]] = [participation_ratio, gini, top_k_mass, dormant_share]


def _coefficients(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double() ** 3


def test_gini_equals_the_mean_absolute_difference_of_all_pairs() -> None:
    coefficients = _coefficients(0, 2, 31)
    for layer, row in enumerate(coefficients.tolist()):
        pairs = math.fsum(abs(a - b) for a in row for b in row)
        naive = pairs / (2 * len(row) ** 2 * (math.fsum(row) / len(row)))
        assert float(gini(coefficients)[layer]) == pytest.approx(naive, abs=1e-13)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_top_k_mass_equals_a_sorted_loop(fraction: float) -> None:
    row = _coefficients(1, 257)
    k = top_k(fraction, 257)
    naive = math.fsum(sorted(row.tolist(), reverse=True)[:k]) / math.fsum(row.tolist())
    assert float(top_k_mass(row, fraction)) == pytest.approx(naive, abs=1e-13)


@pytest.mark.parametrize(
    ("fraction", "d_mlp", "expected"),
    [
        (0.01, 8192, 82),
        (0.01, 11008, 110),
        (0.01, 256, 3),
        (0.01, 40, 1),
        (0.01, 1, 1),
        (0.07, 100, 7),  # 0.07 · 100 is 7.000000000000001: a ceiling would say 8
        (0.29, 100, 29),  # 0.29 · 100 is 28.999999999999996: a floor would say 28
        (0.5, 5, 3),
        (1.0, 12, 12),
    ],
)
def test_top_k_is_the_nearest_count_and_at_least_one(
    fraction: float, d_mlp: int, expected: int
) -> None:
    assert top_k(fraction, d_mlp) == expected


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 1.0])
def test_dormant_share_equals_a_loop(threshold: float) -> None:
    row = _coefficients(2, 101)
    row[:7] = 0.0
    values = row.tolist()
    mean = math.fsum(values) / len(values)
    naive = sum(value / mean <= threshold for value in values) / len(values)
    assert float(dormant_share(row, threshold)) == pytest.approx(naive, abs=1e-15)


def test_participation_ratio_equals_a_loop() -> None:
    row = _coefficients(3, 40)
    values = row.tolist()
    naive = math.fsum(values) ** 2 / math.fsum(v * v for v in values) / 40
    assert float(participation_ratio(row)) == pytest.approx(naive, rel=1e-13)


def test_uniform_use() -> None:
    uniform = torch.full((3, 200), 0.7)
    assert participation_ratio(uniform).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert gini(uniform).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    assert top_k_mass(uniform).tolist() == pytest.approx([0.01] * 3, abs=1e-12)
    assert dormant_share(uniform).tolist() == [0.0] * 3


def test_one_hot_use() -> None:
    one_hot = torch.zeros(200)
    one_hot[13] = 3.0
    assert float(participation_ratio(one_hot)) == pytest.approx(1 / 200, abs=1e-14)
    assert float(gini(one_hot)) == pytest.approx(1 - 1 / 200, abs=1e-14)
    assert float(top_k_mass(one_hot)) == 1.0
    assert float(dormant_share(one_hot)) == pytest.approx(1 - 1 / 200, abs=1e-14)


@pytest.mark.parametrize("measure", ALL)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_layer_without_proportions_is_nan(
    measure: Callable[[Tensor], Tensor], bad: float
) -> None:
    coefficients = torch.ones(2, 8)
    coefficients[1] = bad
    result = measure(coefficients)
    assert math.isfinite(float(result[0]))
    assert math.isnan(float(result[1]))


@pytest.mark.parametrize("measure", ALL)
def test_scale_and_permutation_change_nothing(measure: Callable[[Tensor], Tensor]) -> None:
    coefficients = _coefficients(4, 3, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    # A power of two scales exactly, so that no memory crosses the dormancy threshold by rounding.
    torch.testing.assert_close(
        measure(coefficients[:, order] * 2.0**-40), measure(coefficients), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("measure", ALL)
def test_low_precision_input_gives_float64(measure: Callable[[Tensor], Tensor]) -> None:
    coefficients = _coefficients(6, 2, 64).bfloat16()
    result = measure(coefficients)
    assert result.dtype == torch.float64
    assert torch.equal(result, measure(coefficients.double()))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"top_k_fraction is .*\(0, 1\]"):
        top_k_mass(torch.ones(4), fraction)


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="dormant_threshold is"):
        dormant_share(torch.ones(4), threshold)
