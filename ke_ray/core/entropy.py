"""Knowledge entropy of one layer's mean coefficients.

    prob_i = C̄_i / Σ_j C̄_j        H = −Σ_i prob_i ln prob_i        H(θ) = Σ_l H(θˡ)

Source: Eq. 2 of arXiv 2410.01380. Natural log, so nats; 0 ≤ H ≤ ln d_mlp.

    symbol   meaning
    C̄        mean over instances of the mean over tokens of |C|, one value per memory
    d_mlp    number of memories of a layer

Departures: 0 ln 0 is 0 exactly (the published code adds 1e-9 inside the logarithm, which lowers
a layer's entropy by d_mlp · 1e-9), and everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_nats(mean_coefficients: Tensor) -> Tensor:
    """H = −Σ p ln p with p = C̄ / ΣC̄, over the last axis.

    Args:
        mean_coefficients: [..., d_mlp], non-negative, any real dtype, any scale (only the
            proportions matter).

    Returns:
        float64 [...], nats, in [0, ln d_mlp] to rounding. NaN where all coefficients are zero
        (0/0: there is no distribution) or one of them is negative or not finite, so that a scan
        shows such a layer as a failure and not as a small entropy.
    """
    coefficients = mean_coefficients.to(torch.float64)
    p = coefficients / coefficients.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(p).sum(dim=-1)
    defined = (coefficients >= 0.0).all(dim=-1) & torch.isfinite(entropy)
    return torch.where(defined, entropy, torch.nan)


def effective_memories(mean_coefficients: Tensor) -> Tensor:
    """exp(H): how many equally used memories would have the same entropy.

    Args:
        mean_coefficients: [..., d_mlp], as for `entropy_nats`.

    Returns:
        float64 [...], memories, in [1, d_mlp] to rounding; NaN as for `entropy_nats`.
    """
    return entropy_nats(mean_coefficients).exp()
