"""Concentration of a layer's memory use: four measures of mean coefficients.

    participation ratio   (Σ C̄)² / (m Σ C̄²)                                     1/m … 1
    Gini                  Σ_i (2i − m − 1) C̄_(i) / (m Σ C̄), C̄ ascending         0 … 1 − 1/m
    top-k mass            Σ of the k largest C̄ / Σ C̄, k = fraction · m, rounded  k/m … 1
    dormant share         #{i : C̄_i ≤ τ · mean C̄} / m                            0 … 1 − 1/m (τ < 1)

Source of the dormant share: Sokar et al. 2023, arXiv 2302.12902; the others are standard.
C̄ [..., m] are mean absolute coefficients; m = d_mlp. All four are fractions, depend on proportions
alone (no scale), and are computed in float64. Where all coefficients of a layer are zero, or one
is not finite, the value is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ke_ray.errors import UserError


def participation_ratio(mean_coefficients: Tensor) -> Tensor:
    """(Σ C̄)² / (m Σ C̄²) over the last axis.

    Args:
        mean_coefficients: [..., m], non-negative.

    Returns:
        float64 [...], a fraction in [1/m, 1]: 1/m for one-hot use, 1 for uniform use.
    """
    p = _proportions(mean_coefficients)
    return 1.0 / (p.square().sum(dim=-1) * p.shape[-1])


def gini(mean_coefficients: Tensor) -> Tensor:
    """Gini coefficient over the last axis.

    Equal to the mean absolute difference of all ordered pairs divided by twice the mean,
    Σ_i Σ_j |C̄_i − C̄_j| / (2 m² mean C̄); computed from one sort.

    Args:
        mean_coefficients: [..., m], non-negative.

    Returns:
        float64 [...], a fraction in [0, 1 − 1/m]: 0 for uniform use, 1 − 1/m for one-hot use.
    """
    p = _proportions(mean_coefficients).sort(dim=-1).values
    m = p.shape[-1]
    weights = 2.0 * torch.arange(1, m + 1, dtype=torch.float64, device=p.device) - m - 1.0
    return (p * weights).sum(dim=-1) / m


def top_k(fraction: float, d_mlp: int) -> int:
    """How many memories "the largest `fraction`" are: the nearest whole number, at least 1.

    round(fraction · d_mlp) with halves upwards: 1 % of 8,192 is 82, of 256 is 3, of 40 is 1.

    Raises:
        UserError: the fraction is outside (0, 1].
    """
    check_top_k_fraction(fraction)
    return max(1, math.floor(fraction * d_mlp + 0.5))


def top_k_mass(mean_coefficients: Tensor, fraction: float = 0.01) -> Tensor:
    """Share of ΣC̄ held by the `top_k(fraction, m)` largest coefficients, over the last axis.

    Args:
        mean_coefficients: [..., m], non-negative.
        fraction: in (0, 1]; 0.01 is the largest 1 % of memories.

    Returns:
        float64 [...], a fraction in [k/m, 1].

    Raises:
        UserError: the fraction is outside (0, 1].
    """
    p = _proportions(mean_coefficients)
    return p.topk(top_k(fraction, p.shape[-1]), dim=-1, sorted=False).values.sum(dim=-1)


def dormant_share(mean_coefficients: Tensor, threshold: float = 0.1) -> Tensor:
    """Share of memories i with C̄_i ≤ τ · mean(C̄), over the last axis (τ-dormant).

    Args:
        mean_coefficients: [..., m], non-negative.
        threshold: τ ≥ 0; 0 counts the exactly dead.

    Returns:
        float64 [...], a fraction in [0, 1]; in steps of 1/m.

    Raises:
        UserError: τ is negative or not finite.
    """
    check_dormant_threshold(threshold)
    coefficients = mean_coefficients.to(torch.float64)
    mean = coefficients.mean(dim=-1, keepdim=True)
    share = (coefficients <= threshold * mean).to(torch.float64).mean(dim=-1)
    defined = torch.isfinite(mean[..., 0]) & (mean[..., 0] > 0)
    return torch.where(defined, share, torch.nan)


def check_top_k_fraction(fraction: float) -> None:
    """Raises UserError unless 0 < fraction ≤ 1."""
    if not 0.0 < fraction <= 1.0:
        raise UserError(
            f"top_k_fraction is {fraction}; expected a fraction of the memories in (0, 1], "
            "for example 0.01"
        )


def check_dormant_threshold(threshold: float) -> None:
    """Raises UserError unless 0 ≤ threshold < ∞."""
    if not 0.0 <= threshold < math.inf:
        raise UserError(
            f"dormant_threshold is {threshold}; expected a share of the layer's mean coefficient, "
            "at least 0, for example 0.1"
        )


def _proportions(mean_coefficients: Tensor) -> Tensor:
    """C̄ / ΣC̄ in float64; NaN throughout a row of zeros."""
    coefficients = mean_coefficients.to(torch.float64)
    return coefficients / coefficients.sum(dim=-1, keepdim=True)
