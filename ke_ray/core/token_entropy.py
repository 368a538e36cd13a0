"""Knowledge entropy split into what single tokens do and what sets them apart.

    c_nt   = |C_nt|                           coefficients of token t of instance n
    m_nt   = Σ_i c_nti,  p_nt = c_nt / m_nt   their mass, and the token's own distribution
    w_nt   = m_nt / (N T_n ΣC̄)                the token's share of the coefficient mass; Σ w = 1
    C̄/ΣC̄ = Σ_nt w_nt p_nt                    Eq. 2 of arXiv 2410.01380, regrouped by token
    H(C̄)  = Σ_nt w_nt H(p_nt) + I(token; memory)

The first term is `token_entropy`: how many memories one token draws on. The second is
`memory_information`, the mutual information of token and memory, Σ_nt w_nt KL(p_nt ‖ C̄/ΣC̄) ≥ 0:
how far tokens draw on different ones. Knowledge entropy falls when each token uses fewer memories,
or when tokens use the same ones.

**Means of instances.** The split is exact for any weights of tokens, once p is averaged with w.
Eq. 2 averages over the tokens of an instance and then over instances, so a token weighs 1/(N T_n)
and not 1/ΣT_n: the tokens of a short instance weigh more. The split is that of the C̄ that is
reported as knowledge entropy, and the two terms add up to it. The weight is part of w_nt alone, and
what has to be summed is, like C̄, a mean over instances of means over tokens:

    E = (1/N) Σ_n (1/T_n) Σ_t m_nt H(p_nt)    Σ w H(p) = E / ΣC̄

**Experts.** Of a mixture (`core.experts`) a token's distribution is over the memories of all
experts that it is routed to. They are seen one by one, and joined by the chain rule, with m_e the
token's mass in expert e: m H = Σ_e m_e H_e + m ln m − Σ_e m_e ln m_e.

The split is ours; the paper has none. Natural log, nats. Terms are float32 at least and none of
them is negative, so nothing cancels; sums over tokens are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ke_ray.core.coefficients import accumulation_dtype
from ke_ray.core.entropy import entropy_nats

_ROWS_CPU = 64  # tokens whose terms stay near the core
_CHUNK_ACCELERATOR = 2**25


class TokenEntropies:
    """m H of every token of a batch, from its coefficients or those of one expert after another."""

    def __init__(self, num_tokens: int, device: torch.device | str = "cpu") -> None:
        # Σ m_e, Σ m_e H_e and Σ m_e ln m_e of each token
        self._parts = torch.zeros((3, num_tokens), dtype=torch.float64, device=device)

    def add(self, tokens: Tensor | slice, rows: Tensor, weights: Tensor | None = None) -> None:
        """Add coefficients of some tokens, of memories that were not added before.

        Args:
            tokens: int64 [k] indices, each once, or a slice of k tokens.
            rows: [k, memories], any float dtype and sign; they are only read.
            weights: [k] ≥ 0 that multiply the rows; default: one.
        """
        mass, weighted = mass_and_entropy(rows)
        if weights is not None:
            mass, weighted = mass * weights, weighted * weights
        self._parts[:, tokens] += torch.stack([mass, weighted, torch.xlogy(mass, mass)])

    def weighted(self) -> Tensor:
        """m H: float64 [num_tokens], nats times mass; 0 for a token without mass."""
        mass, within, logarithms = self._parts
        return within + (torch.xlogy(mass, mass) - logarithms)


def mass_and_entropy(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_i |C_i| and −Σ_i |C_i| ln(|C_i| / Σ|C|) of every token.

    Args:
        rows: [k, memories] coefficients C, any float dtype and sign.

    Returns:
        m and m H, float64 [k] each: ≥ 0; both 0 where all coefficients are.
    """
    dtype = accumulation_dtype(rows.dtype)
    tiny = torch.finfo(dtype).tiny
    size = _ROWS_CPU if rows.device.type == "cpu" else max(1, _CHUNK_ACCELERATOR // rows.shape[1])
    both = torch.empty((2, rows.shape[0]), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], size):
        magnitudes = rows[start : start + size].to(dtype).abs()
        mass = magnitudes.sum(dim=1, keepdim=True)
        # 0 ln 0 is 0: the logarithm of `tiny` is finite.
        terms = (magnitudes / mass.clamp_min(tiny)).clamp_min_(tiny).log_().mul_(magnitudes)
        both[0, start : start + size] = mass[:, 0]
        both[1, start : start + size] = terms.sum(dim=1).neg_()
    return both[0], both[1]


def token_entropy(weighted: Tensor, mean_coefficients: Tensor) -> Tensor:
    """Σ_t w_t H(p_t) = E / ΣC̄, the mean entropy of a token's own distribution.

    Args:
        weighted: [...] E, the mean of m H as C̄ is one of coefficients.
        mean_coefficients: [..., d_mlp] C̄.

    Returns:
        float64 [...], nats, in [0, H(C̄)] to rounding; NaN as ``entropy_nats``.
    """
    mass = mean_coefficients.to(torch.float64).sum(dim=-1)
    entropy = weighted.to(torch.float64) / mass
    return torch.where(torch.isfinite(entropy_nats(mean_coefficients)), entropy, torch.nan)


def memory_information(weighted: Tensor, mean_coefficients: Tensor) -> Tensor:
    """I(token; memory) = H(C̄) − Σ_t w_t H(p_t), shapes as ``token_entropy``.

    Returns:
        float64 [...], nats, ≥ 0 to rounding (not clamped, so that the two terms add up to
        knowledge entropy); 0 where all tokens draw on their memories in the same proportions.
    """
    return entropy_nats(mean_coefficients) - token_entropy(weighted, mean_coefficients)
