"""Geometry of one weight matrix W [rows, columns], from its singular values σ₁ ≥ … ≥ σ_n.

    n = min(rows, columns), p = σ / Σσ
    Frobenius norm       √(Σσ²)
    spectral norm        σ₁
    condition number     σ₁ / σ_n
    stable rank          Σσ² / σ₁²                    1 … n
    PER                  exp(−Σ p ln p) / n           1/n … 1

exp(H(p)) is the effective rank of Roy and Vetterli 2007; PER is its share of n. We found no source
that defines PER under this name.

Singular values are roots of eigenvalues of the smaller Gram matrix in float64, several times
cheaper than a decomposition of W. So a condition number above about 7·10⁷/√n is lost in rounding;
it is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ke_ray.core.geometry import symmetric_spectrum


@dataclass(frozen=True)
class MatrixGeometry:
    """The five values; NaN where W is zero or not finite, and where rounding decides."""

    frobenius_norm: float
    spectral_norm: float
    condition_number: float
    stable_rank: float
    per: float


def matrix_geometry(weight: Tensor) -> MatrixGeometry:
    """The geometry of W, two-dimensional, of any floating dtype, on any device."""
    rows = weight.detach().to(torch.float64)
    rows = rows if rows.shape[0] <= rows.shape[1] else rows.t()
    squares = symmetric_spectrum(rows @ rows.t())
    values = squares.sqrt()
    largest, smallest = float(values[0]), float(values[-1])
    if not largest > 0:
        norm = largest if math.isnan(largest) else 0.0
        return MatrixGeometry(norm, norm, math.nan, math.nan, math.nan)
    shares = values / values.sum()
    return MatrixGeometry(
        frobenius_norm=float(squares.sum().sqrt()),
        spectral_norm=largest,
        condition_number=largest / smallest if smallest > 0 else math.nan,
        stable_rank=float(squares.sum() / squares[0]),
        per=float(torch.special.entr(shares).sum().exp()) / len(values),
    )


def distance(one: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference of two matrices of one shape, in float64."""
    return float(torch.linalg.matrix_norm(one.to(torch.float64) - other.to(torch.float64)))
