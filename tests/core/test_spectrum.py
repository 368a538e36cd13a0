"""Geometry of a weight matrix: against a full decomposition, limits and rounding."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from ke_ray.core.spectrum import distance, matrix_geometry


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_singular_values(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sigma = torch.linalg.svdvals(weight.double()).tolist()
    shares = [value / sum(sigma) for value in sigma]
    assert asdict(matrix_geometry(weight)) == pytest.approx(
        {
            "frobenius_norm": math.sqrt(sum(float(w) ** 2 for w in weight.flatten())),
            "spectral_norm": max(sigma),
            "condition_number": max(sigma) / min(sigma),
            "stable_rank": sum(value**2 for value in sigma) / max(sigma) ** 2,
            "per": math.exp(-sum(p * math.log(p) for p in shares)) / 24,
        }
    )


def test_a_rotation_has_full_rank_and_one_direction_has_rank_one():
    rotation = matrix_geometry(torch.linalg.qr(torch.randn(16, 16).double()).Q)
    assert rotation.condition_number == pytest.approx(1)
    assert rotation.stable_rank == pytest.approx(16)
    assert rotation.per == pytest.approx(1)
    single = matrix_geometry(torch.outer(torch.arange(1.0, 9), torch.ones(5)))
    assert single.stable_rank == pytest.approx(1)
    assert single.per == pytest.approx(1 / 5)
    assert math.isnan(single.condition_number), "rounding decides it"


def test_a_scale_changes_norms_alone():
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).double()
    one, other = asdict(matrix_geometry(weight)), asdict(matrix_geometry(-3 * weight))
    for name in one:
        factor = 3 if name.endswith("norm") else 1
        assert other[name] == pytest.approx(factor * one[name]), name


def test_zero_and_broken_matrices_have_no_ranks():
    zero = matrix_geometry(torch.zeros(3, 4))
    assert (zero.frobenius_norm, zero.spectral_norm) == (0, 0)
    assert math.isnan(zero.stable_rank)
    assert math.isnan(zero.per)
    assert math.isnan(matrix_geometry(torch.full((3, 4), torch.nan)).frobenius_norm)


def test_distance_is_exact_where_bfloat16_would_round():
    one = torch.full((2, 2), 256.0, dtype=torch.bfloat16)
    assert distance(one, one.float() + 0.25) == pytest.approx(0.5)
