"""How alike two checkpoints, or two corpora, use the memories of a layer.

Of mean coefficients a, b [m] of one layer, with p = a / Σa and q = b / Σb:

    Jensen–Shannon distance   √( H((p + q) / 2) − (H(p) + H(q)) / 2 )      0 … √(ln 2), H in nats
    cosine                    a·b / (‖a‖ ‖b‖)                              0 … 1
    rank correlation          Pearson's r of the ranks (Spearman's ρ)      −1 … 1
    top overlap               |top k of a ∩ top k of b| / k                0 … 1, k = 1 % of m

Sources: Lin 1991 for the divergence, Endres and Schindelin 2003 for its root, a metric; the
others are standard. Equal coefficients share the mean of their ranks; where they meet at the k-th
place, the memory of the lower number counts. All four compare memory i with memory i, so they have
a meaning within one training run, between which initialisations differ. A row whose coefficients
are all zero has no proportions: its values are NaN. In numpy, so that reports need no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

NAMES = ("js_distance", "cosine", "rank_correlation", "top_overlap")
TOP_FRACTION = 0.01
_BLOCK_BYTES = 2**20  # mixtures of distributions at a time, which stay in the cache


def similarities(one: np.ndarray, other: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The four measures between every row of ``one`` and every row of ``other``.

    Args:
        one: [n, m], non-negative mean coefficients of one layer.
        other: [k, m]; None compares the rows of ``one`` with each other, at half the cost.

    Returns:
        By name of ``NAMES``, float64 [n, k]; NaN where a row is all zero, or m is 0.

    Raises:
        ValueError: the two do not have the same memories.
    """
    a = np.asarray(one, np.float64)
    b = a if other is None else np.asarray(other, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"coefficients {a.shape} and {b.shape} are not of the same memories")
    if not a.shape[1]:
        return {name: np.full((len(a), len(b)), np.nan) for name in NAMES}
    k = max(1, math.floor(TOP_FRACTION * a.shape[1] + 0.5))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "js_distance": _js_distances(a, None if other is None else b),
            "cosine": np.clip(_unit(a) @ _unit(b).T, 0.0, 1.0),
            "rank_correlation": np.clip(_unit_ranks(a) @ _unit_ranks(b).T, -1.0, 1.0),
            "top_overlap": _top(a, k) @ _top(b, k).T / k,
        }


def over_layers(layers: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """`similarities` between n checkpoints, layer by layer.

    Args:
        layers: [n, n_layers, d_mlp], NaN beyond a layer's own memories, which must be the same
            in all.

    Yields:
        For every layer [n, n] by name; NaN throughout where the layer has no memories.
    """
    for layer in range(layers.shape[1]):
        own = ~np.isnan(layers[0, layer])
        yield similarities(layers[:, layer, own])


def widths(coefficients: np.ndarray) -> tuple[int, ...]:
    """The memories of every layer of C̄ [n_layers, d_mlp]."""
    return tuple(int(width) for width in (~np.isnan(coefficients)).sum(axis=1))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 of values [m], float64; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def _js_distances(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    p = a / a.sum(axis=1, keepdims=True)
    q = p if b is None else b / b.sum(axis=1, keepdims=True)
    entropies = _entropies(p), _entropies(q)
    distances = np.zeros((len(p), len(q)))
    rows = max(1, _BLOCK_BYTES // max(1, q.itemsize * q.shape[1]))
    for i, row in enumerate(p):
        for start in range(i + 1 if b is None else 0, len(q), rows):
            block = slice(start, start + rows)
            mixture = (q[block] + row) / 2
            excess = _entropies(mixture) - (entropies[0][i] + entropies[1][block]) / 2
            # 0 up to rounding where two rows are equal, and never more than ln 2.
            distances[i, block] = np.sqrt(np.clip(excess, 0.0, math.log(2)))
    if b is None:
        distances += distances.T
        np.fill_diagonal(distances, np.where(np.isfinite(entropies[0]), 0.0, np.nan))
    return distances


def _entropies(p: np.ndarray) -> np.ndarray:
    """H of every row in nats, with 0 ln 0 = 0; NaN of a row without proportions."""
    logs = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    return -np.einsum("ij,ij->i", p, logs)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _unit_ranks(rows: np.ndarray) -> np.ndarray:
    ranks = np.array([average_ranks(row) for row in rows]).reshape(rows.shape)
    centred = ranks - (rows.shape[1] + 1) / 2
    return _unit(centred)  # 0 / 0 where all are equal


def _top(rows: np.ndarray, k: int) -> np.ndarray:
    """1.0 at the k largest of every row [n, m], else 0.0; NaN throughout a row of zeros."""
    top = np.zeros_like(rows)
    order = np.argsort(-rows, axis=1, kind="stable")[:, :k]
    np.put_along_axis(top, order, 1.0, axis=1)
    top[rows.sum(axis=1) == 0] = np.nan
    return top
