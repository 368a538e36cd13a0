"""Effective rank and decay of a spectrum, against the singular values of the very matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ke_ray.core.geometry import alpha_req, moments, rank_me


def hidden_states(tokens: int = 300, width: int = 100, decay: float = 0.5) -> torch.Tensor:
    """Rows around a centre far from zero, whose covariance decays as a power of the rank."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).double() ** -decay
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scale
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return rows @ turn + 0.3


def test_the_effective_rank_is_that_of_the_singular_values():
    rows = hidden_states()
    p = np.linalg.svd(rows.numpy(), compute_uv=False)
    p = p / p.sum()
    expected = math.exp(-sum(v * math.log(v) for v in p))
    merged = (moments(rows[:120].float()) + moments(rows[120:].float())) / 2
    assert float(rank_me(merged)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("width", "first", "last"), [(100, 11, 50), (20, 3, 10)])
def test_alpha_is_the_slope_of_the_eigenvalues_of_the_covariance(width, first, last):
    rows = hidden_states(width=width)
    values = np.sort(np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False, bias=True)))[::-1]
    ranks = np.arange(first, last + 1)
    slope = np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1)[0]
    got = alpha_req(moments(rows[:9]) + moments(rows[9:]))
    assert float(got) == pytest.approx(-slope, rel=1e-6)


def test_a_power_law_is_found():
    many = hidden_states(tokens=20_000, decay=0.6)  # standard deviations: eigenvalues twice that
    assert float(alpha_req(moments(many))) == pytest.approx(1.2, abs=0.05)


def test_equal_use_of_all_dimensions_has_full_rank_and_of_one_rank_one():
    assert float(rank_me(moments(torch.eye(16)))) == pytest.approx(16)
    one = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 17))
    assert float(rank_me(moments(one))) == pytest.approx(1, abs=1e-4)
    assert math.isnan(float(alpha_req(moments(one))))


def test_fewer_tokens_than_dimensions_have_the_rank_of_the_tokens():
    rows = hidden_states(tokens=30)
    values = np.linalg.svd((rows - rows.mean(dim=0)).numpy(), compute_uv=False) ** 2
    ranks = np.arange(4, 15)  # 29 values are not zero
    slope = np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1)[0]
    assert float(alpha_req(moments(rows))) == pytest.approx(-slope, rel=1e-6)
    assert float(rank_me(moments(rows))) <= 30


def test_what_is_not_finite_is_not_hidden():
    rows = torch.ones(4, 8)
    rows[1, 2] = torch.inf
    assert math.isnan(float(rank_me(moments(rows))))
    assert math.isnan(float(alpha_req(moments(rows))))
