"""Geometry of hidden states: effective rank and decay of the spectrum, from second moments.

    X        [tokens, d_model] final hidden states (after the final norm) of all real tokens of D
    M        Σ_t [x_t, 1] [x_t, 1]ᵀ: second moments, sums and number of tokens; mergeable
    RankMe   exp(−Σ_k p_k ln p_k), p_k = σ_k / Σσ, σ the singular values of X: σ² are the
             eigenvalues of XᵀX
    α-ReQ    −slope of ln λ_i over ln i, λ_1 ≥ λ_2 ≥ … the eigenvalues of the covariance of X

Sources: RankMe is Garrido et al. 2023, arXiv 2210.02885, which adds 1e-7 to every p_k for the
rounding of float32; moments here are float64, and 0 ln 0 is 0. α-ReQ is Agrawal et al. 2022
(NeurIPS). Li et al. 2025, arXiv 2509.23024, follow both over pretraining; as far as we could read
it, they take the last token of each sequence, of which a scan has too few for a spectrum, so
**these are measured over all tokens, and levels are not theirs**.

Not confirmed in the sources, and therefore our choice: X is not centred for RankMe and is for
α-ReQ; the slope is a least-squares fit over the ranks 11 to 500 (the range of Stringer et al. 2019,
Nature 571, whose method it is), or up to half of the rank where that is less.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _LAST = 11, 500


def moments(hidden: Tensor) -> Tensor:
    """M of one instance: [T, d_model] → float64 [d_model + 1, d_model + 1].

    Float64, because σ are roots: of float32 moments, all below 3e-4 of the largest are noise.
    """
    rows = torch.nn.functional.pad(hidden.double(), (0, 1), value=1.0)
    return rows.T @ rows


def rank_me(mean_moments: Tensor) -> Tensor:
    """RankMe, from M of any scale: [d_model + 1, d_model + 1] → float64 [], 1 … d_model.

    NaN where all hidden states are zero or a moment is not finite.
    """
    sigma = symmetric_spectrum(mean_moments[:-1, :-1]).sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()


def alpha_req(mean_moments: Tensor) -> Tensor:
    """α of λ_i ∝ i^−α, from M of any scale: [d_model + 1, d_model + 1] → float64 [].

    NaN where the covariance has a rank below 4, which has no slope, or is not finite.
    """
    count = mean_moments[-1, -1]
    centre = mean_moments[-1, :-1] / count
    values = symmetric_spectrum(mean_moments[:-1, :-1] / count - torch.outer(centre, centre))
    rank = int((values > 0).sum())
    if rank < 4:
        return values.new_tensor(torch.nan)
    first, last = min(_FIRST, 1 + rank // 8), min(_LAST, rank // 2)
    x = torch.arange(first, last + 1, dtype=torch.float64, device=values.device).log()
    y = values[first - 1 : last].log()
    x = x - x.mean()
    return -(x * y).sum() / x.square().sum()


def symmetric_spectrum(symmetric: Tensor) -> Tensor:
    """Eigenvalues, descending; 0 below rounding, NaN where an entry is not finite."""
    if not bool(torch.isfinite(symmetric).all()):
        return symmetric.new_full(symmetric.shape[:1], torch.nan)
    values = torch.linalg.eigvalsh(symmetric).flip(0)
    smallest = len(values) * torch.finfo(values.dtype).eps * values[0]
    return torch.where(values > smallest, values, 0.0)
