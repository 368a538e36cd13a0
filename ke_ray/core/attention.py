"""Attention entropy without the T × T matrix.

For one causal attention row with scores s = scale · q·k and probabilities p = softmax(s)
(Eq. 3 of arXiv 2410.01380 takes its entropy; the identity is derived):

    H = −Σ_j p_j ln p_j = logsumexp(s) − Σ_j p_j s_j
      = lse − scale · q · (Σ_j p_j k_j) = lse − scale · q · Attn(Q, K, V := K)

so one call of a flash kernel with the keys in the place of the values, which also returns lse,
gives every row's entropy in memory linear in T.

    symbol      shape                       meaning
    query       [batch, heads, T, d_head]   after QK-norm and rotary embedding
    key         [batch, heads, S, d_head]   heads repeated where queries share keys
    mask        [batch|1, 1|heads, T, S]    bool, True where a query may look
    entropy     [batch, heads, T]           nats, 0 ≤ H ≤ ln(number of visible keys)

The identity holds for s = scale · q·k and a 0/−∞ mask, used in both. Soft-capped scores and
additive biases change s, so ``rows_entropy`` forms a few rows at a time instead. Both run in
float32 at least: in bfloat16 the identity is biased (mean −5e-3 nats, rows up to 0.1). Rounding
can put a one-key row a few 1e-7 below zero; results are clamped at 0.

Both terms of the identity are rounded at the size of the scores, which exceeds H in a row that
looks at one key. A vector common to all keys changes no p but every s, so the mean key is taken
off first; heads whose |lse| still exceeds 32 nats are computed row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 128  # queries whose scores are formed at once by `rows_entropy`
_TRUSTED_LSE = 32.0  # nats; float32 keeps such a sum to about 2e-6


def attention_entropy(
    query: Tensor, key: Tensor, *, scale: float, causal: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Entropy of every attention row, by the flash identity where a kernel returns lse.

    Args:
        query, key: [batch, heads, T, d_head], equal numbers of heads; any float dtype
            (bfloat16 and float16 are computed in float32).
        scale: what q·k is multiplied by before the softmax.
        causal: query t sees keys 0 … t; ignored when ``mask`` is given.
        mask: bool, True where a query may look. Every query must see at least one key.

    Returns:
        float32 (float64 for float64 inputs) [batch, heads, T], nats.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    key = key - key.mean(dim=-2, keepdim=True)
    if query.device.type == "cpu":
        bias = None if mask is None else _bias(mask, dtype)
        mean_key, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, key, 0.0, causal and mask is None, attn_mask=bias, scale=scale
        )
    elif query.device.type == "cuda" and dtype == torch.float32:
        mean_key, lse = _efficient_attention(query, key, scale, causal, mask)
    else:
        return rows_entropy(query, key, scale=scale, causal=causal, mask=mask)[0]
    entropy = identity_entropy(lse, query, mean_key, scale)
    for batch, heads in enumerate((lse.abs() > _TRUSTED_LSE).any(dim=-1).cpu()):
        if dtype == torch.float32 and bool(heads.any()):
            chosen = heads.nonzero()[:, 0].to(query.device)
            rows = query[batch : batch + 1, chosen], key[batch : batch + 1, chosen]
            entropy[batch, chosen] = rows_entropy(
                *rows, scale=scale, causal=causal, mask=_of(mask, batch, chosen)
            )[0][0]
    return entropy


def identity_entropy(lse: Tensor, query: Tensor, mean_key: Tensor, scale: float) -> Tensor:
    """lse − scale · q·(Σ p k), clamped at 0: [batch, heads, T] nats."""
    return (lse - scale * torch.linalg.vecdot(query, mean_key)).clamp_min_(0.0)


def _of(mask: Tensor | None, batch: int, heads: Tensor) -> Tensor | None:
    """The part of a mask, [batch or 1, heads or 1, T, S], that some heads of one item see."""
    if mask is None:
        return None
    part = mask[batch : batch + 1] if mask.shape[0] > 1 else mask
    return part[:, heads] if part.shape[1] > 1 else part


def rows_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    softcap: float | None = None,
    rows: int = _ROWS,
) -> tuple[Tensor, Tensor | None]:
    """Entropy of every attention row by forming ``rows`` rows of scores at a time. Exact.

    Scores are softcap · tanh(scale · q·k / softcap) when ``softcap`` is given (Gemma-2), then
    ``mask`` applies: boolean, or additive in nats.

    Args:
        query, key, causal, scale: as ``attention_entropy``.
        value: [batch, heads, S, d_head]; when given, the attention output is returned too.
        mask: bool, or float that is added to the scores.
        rows: queries at a time; memory is batch · heads · rows · S.

    Returns:
        entropy [batch, heads, T] in float32 (float64 for float64 inputs), and the attention
        output [batch, heads, T, d_head] in the dtype of ``value``, or ``None``.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    entropy = query.new_empty(query.shape[:-1])
    output = None if value is None else torch.empty_like(query, dtype=value.dtype)
    hides_future = causal and mask is None
    for start in range(0, num_queries, rows):
        stop = min(start + rows, num_queries)
        seen = stop if hides_future else num_keys
        scores = torch.matmul(query[..., start:stop, :], key[..., :seen, :].transpose(-1, -2))
        scores.mul_(scale)  # [batch, heads, rows, seen]
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if hides_future:
            future = torch.ones(stop - start, seen, dtype=torch.bool, device=scores.device)
            scores.masked_fill_(future.triu_(start + 1), -torch.inf)
        elif mask is not None:
            part = mask[..., start:stop, :seen]
            if part.dtype == torch.bool:
                scores.masked_fill_(~part, -torch.inf)
            else:
                scores.add_(part)
        log_p = torch.log_softmax(scores, dim=-1)
        p = log_p.exp()
        # A hidden key has p = 0 and log p = −∞; 0 · ln 0 = 0.
        entropy[..., start:stop] = -torch.linalg.vecdot(p, log_p.masked_fill_(p == 0, 0.0))
        if output is not None and value is not None:
            output[..., start:stop, :] = torch.matmul(p.to(value.dtype), value[..., :seen, :])
    return entropy.clamp_min_(0.0), output


def probabilities_entropy(probabilities: Tensor, *, rows: int = _ROWS) -> Tensor:
    """Entropy of attention rows that are given, ``rows`` of them at a time.

    Args:
        probabilities: [batch, heads, T, S], softmax(s); any float dtype.

    Returns:
        float32 (float64 for float64 inputs) [batch, heads, T], nats.
    """
    dtype = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    parts = probabilities.split(rows, dim=2)
    return torch.cat([torch.special.entr(part.to(dtype)).sum(dim=-1) for part in parts], dim=2)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _efficient_attention(
    query: Tensor, key: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean keys and lse by CUDA's memory-efficient kernel, the only one that takes float32."""
    bias = None
    if mask is not None:
        # The kernel wants rows of the bias aligned to 16 elements and all leading sizes present.
        num_keys = key.shape[-2]
        padded = functional.pad(_bias(mask, query.dtype), (0, -num_keys % 16))[..., :num_keys]
        bias = padded.expand(query.shape[0], query.shape[1], query.shape[2], num_keys)
    d_head = key.shape[-1]
    if d_head % 4:  # so must rows of q and k; zeros change neither scores nor the product below
        query = functional.pad(query, (0, -d_head % 4))
        key = functional.pad(key, (0, -d_head % 4))
    mean_key, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, key, bias, True, 0.0, causal and mask is None, scale=scale
    )
    # lse comes padded to a multiple of 32 rows.
    return mean_key[..., :d_head], lse[..., : query.shape[-2]]
