"""Next-token-prediction entropy (A.4 of arXiv 2410.01380), streamed over tokens.

    H = −Σ_v p_v ln p_v,  p = softmax(z)      z: logits over the whole vocabulary
      = ln W − (Σ_v w_v c_v) / W,  c = z − max z,  w = exp(c),  W = Σ_v w_v

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


def next_token_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) for every row.

    Args:
        logits: [tokens, vocabulary], any float dtype (below float32 computed in float32).
            −∞ marks a token that cannot be predicted.

    Returns:
        float64 [tokens], nats.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    rows = _CACHE_ROWS
    if logits.device.type != "cpu":
        rows = max(1, _CHUNK_ACCELERATOR // 2 // logits.shape[-1])  # two buffers: as many in all
    entropy = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
    buffers = torch.empty_like(logits[:rows]), torch.empty_like(logits[:rows])
    for start in range(0, logits.shape[0], rows):
        part = logits[start : start + rows]
        centred, weights = (buffer[: part.shape[0]] for buffer in buffers)
        torch.sub(part, part.amax(dim=-1, keepdim=True), out=centred)
        # An impossible token adds nothing: exp(−1000) is 0, and 0 · −1000, unlike 0 · −∞, is too.
        torch.exp(centred.clamp_min_(-1000.0), out=weights)
        total = weights.sum(dim=-1, dtype=torch.float64)
        expected = centred.mul_(weights).sum(dim=-1, dtype=torch.float64) / total
        entropy[start : start + rows] = total.log() - expected
    return entropy.clamp_min_(0.0)


def streamed_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """``next_token_entropy`` of ``head(hidden)``, a chunk of tokens at a time.

    Args:
        hidden: [tokens, d_model], after the final norm.
        head: maps [chunk, d_model] to logits [chunk, vocabulary], soft-capping and bias included.
        vocabulary: number of logits, which fixes the chunk: at most 2²⁴ logits are held
            on a CPU, 2²⁷ on an accelerator (but at least 32 tokens).

    Returns:
        float64 [tokens], nats.
    """
    elements = _CHUNK_CPU if hidden.device.type == "cpu" else _CHUNK_ACCELERATOR
    chunk = max(32, min(4096, elements // vocabulary))
    parts = [next_token_entropy(head(part)) for part in hidden.split(chunk)]
    return torch.cat(parts) if parts else hidden.new_empty(0, dtype=torch.float64)
