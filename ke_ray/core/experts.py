"""Knowledge entropy of a mixture of experts, split into routing and what lies within experts.

    c_{e,i} = g_e · |C_{e,i}|                 coefficient of memory i of expert e, for one token
    C̄_{e,i} = mean over instances of the mean over their tokens of c_{e,i}
    π_e     = Σ_i C̄_{e,i} / Σ_e Σ_i C̄_{e,i}   share of expert e in the coefficient mass
    H       = H(π) + Σ_e π_e H_e              exactly (chain rule of entropy)

**The definition is ours, not the paper's**: arXiv 2410.01380 has dense models only. All memories of
all experts of a layer form one vector, expert by expert, so that Eq. 2 and everything computed from
C̄ apply unchanged; an expert that a token is not routed to contributes zero. With one expert of
weight one it is the paper's definition.

    symbol   meaning
    g_e      the router's weight for expert e; 0 where the token is not routed to it; 1 for a shared
             expert, or what the shared expert's own gate says, where it has one (Qwen2-MoE)
    C_{e,i}  input of the second projection of expert e
    H(π)     routing entropy, nats, 0 … ln(number of experts)
    H_e      entropy of C̄_{e,·} normalised within expert e, nats, 0 … ln(its memories)
    sizes    memories of each expert of a layer, in the order of the vector

Everything is a function of the averaged vector, so merged sums and the jackknife hold as they do
for knowledge entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ke_ray.core.entropy import entropy_nats


def expert_masses(mean_coefficients: Tensor, sizes: Sequence[int]) -> Tensor:
    """Σ_i C̄_{e,i} of each expert: [..., Σ sizes] → float64 [..., len(sizes)], of any scale."""
    parts = mean_coefficients.to(torch.float64).split(list(sizes), dim=-1)
    return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)


def expert_entropies(mean_coefficients: Tensor, sizes: Sequence[int]) -> Tensor:
    """H_e of each expert: [..., Σ sizes] → float64 [..., len(sizes)], nats.

    NaN for an expert that no token draws on, which has no distribution.
    """
    parts = mean_coefficients.split(list(sizes), dim=-1)
    return torch.stack([entropy_nats(part) for part in parts], dim=-1)


def routing_entropy(mean_coefficients: Tensor, sizes: Sequence[int]) -> Tensor:
    """H(π) over the last axis: [..., Σ sizes] → float64 [...], nats.

    NaN as ``entropy_nats``. 0 for a layer with one expert.
    """
    return entropy_nats(expert_masses(mean_coefficients, sizes))


def within_expert_entropy(mean_coefficients: Tensor, sizes: Sequence[int]) -> Tensor:
    """Σ_e π_e H_e over the last axis: [..., Σ sizes] → float64 [...], nats.

    NaN as ``entropy_nats`` of the whole vector; an expert without mass adds nothing.
    """
    masses = expert_masses(mean_coefficients, sizes)
    shares = masses / masses.sum(dim=-1, keepdim=True)
    weighted = shares * expert_entropies(mean_coefficients, sizes)
    within = torch.where(shares == 0.0, 0.0, weighted).sum(dim=-1)
    return torch.where(torch.isfinite(entropy_nats(mean_coefficients)), within, torch.nan)
