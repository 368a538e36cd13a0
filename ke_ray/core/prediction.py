"""Next-token-prediction entropy (A.4 of arXiv 2410.01380) and loss, streamed over tokens.

    H = −Σ_v p_v ln p_v,  p = softmax(z)      z: logits over the whole vocabulary
      = ln W − (Σ_v w_v c_v) / W,  c = z − max z,  w = exp(c),  W = Σ_v w_v
    ℓ = −ln p_y = ln W − c_y                  y: the token that does follow

The logits of all tokens (N · T · vocabulary numbers) never exist together: the head is applied
to a chunk of tokens, and within it the softmax runs over a few rows that stay in the cache.
Logits are centred first: in lse − Σ p z both terms are as large as the logits, and where one
token is nearly certain their float32 rounding exceeds H itself. Terms are float32, sums over the
vocabulary float64, so errors stay below 5e-7 nats; 0 ≤ H ≤ ln(vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_CPU = 2**24  # logits held at once: 64 MB in float32
_CHUNK_ACCELERATOR = 2**27
_CACHE_ROWS = 32  # on a CPU: rows whose softmax stays near the core (measured, vocabulary 50k)


def next_token_entropy(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits) for every row and, beside it, its loss.

    Args:
        logits: [tokens, vocabulary], any float dtype (below float32 computed in float32).
            −∞ marks a token that cannot be predicted.
        targets: int64 [tokens], the token that follows each.

    Returns:
        float64 [tokens], nats; with ``targets`` [2, tokens], entropy and loss.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    rows = _CACHE_ROWS
    if logits.device.type != "cpu":
        rows = max(1, _CHUNK_ACCELERATOR // 2 // logits.shape[-1])  # two buffers: as many in all
    shape = (logits.shape[0],) if targets is None else (2, logits.shape[0])
    values = torch.empty(shape, dtype=torch.float64, device=logits.device)
    entropy = values if targets is None else values[0]
    buffers = torch.empty_like(logits[:rows]), torch.empty_like(logits[:rows])
    for start in range(0, logits.shape[0], rows):
        part = logits[start : start + rows]
        centred, weights = (buffer[: part.shape[0]] for buffer in buffers)
        torch.sub(part, part.amax(dim=-1, keepdim=True), out=centred)
        if targets is not None:
            followed = centred.gather(1, targets[start : start + rows, None])[:, 0].double()
        # An impossible token adds nothing: exp(−1000) is 0, and 0 · −1000, unlike 0 · −∞, is too.
        torch.exp(centred.clamp_min_(-1000.0), out=weights)
        total = weights.sum(dim=-1, dtype=torch.float64)
        expected = centred.mul_(weights).sum(dim=-1, dtype=torch.float64) / total
        entropy[start : start + rows] = total.log() - expected
        if targets is not None:
            values[1, start : start + rows] = total.log() - followed
    entropy.clamp_min_(0.0)
    return values


def streamed_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    targets: Tensor | None = None,
) -> Tensor:
    """``next_token_entropy`` of ``head(hidden)``, a chunk of tokens at a time.

    Args:
        hidden: [tokens, d_model], after the final norm.
        head: maps [chunk, d_model] to logits [chunk, vocabulary], soft-capping and bias included.
        vocabulary: number of logits, which fixes the chunk: at most 2²⁴ logits are held
            on a CPU, 2²⁷ on an accelerator (but at least 32 tokens).
        targets: int64 [tokens], for the loss too.

    Returns:
        float64 [tokens], nats; with ``targets`` [2, tokens], entropy and loss.
    """
    elements = _CHUNK_CPU if hidden.device.type == "cpu" else _CHUNK_ACCELERATOR
    chunk = max(32, min(4096, elements // vocabulary))
    if targets is None:
        parts = [next_token_entropy(head(part)) for part in hidden.split(chunk)]
    else:
        pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
        parts = [next_token_entropy(head(part), followed) for part, followed in pairs]
    return torch.cat(parts, dim=-1) if parts else hidden.new_empty(0, dtype=torch.float64)


def loss(nats: Tensor, predictions: Tensor) -> Tensor:
    """Mean of ℓ over all predicted tokens of D, from means over instances.

    Args:
        nats: [] mean over instances of Σ_t ℓ_t, which an instance of T_n tokens has T_n − 1 of.
        predictions: [] mean over instances of T_n − 1.

    Returns:
        float64 [], nats per token; NaN where no token is predicted. Where lengths differ it is not
        the mean over instances of their means: every token counts the same, as in training.
    """
    return nats.double() / predictions.double()


def perplexity(nats: Tensor, predictions: Tensor) -> Tensor:
    """exp(loss): how many equally likely tokens would be as hard to tell apart; as ``loss``."""
    return loss(nats, predictions).exp()
