"""Weighted delete-a-group jackknife over fixed groups of instances.

    h_g  = n / n_g
    θ_J  = G θ̂ − Σ_g (1 − n_g/n) θ_(g)
    τ_g  = h_g θ̂ − (h_g − 1) θ_(g)
    SE²  = 1/G Σ_g (τ_g − θ_J)² / (h_g − 1)

Source: Busing, Meijer & van der Leeden, "Delete-m Jackknife for Unequal m", Statistics and
Computing 9 (1999) 3–8. With equal groups it is the usual (G − 1)/G Σ (θ_(g) − mean θ_(·))².

    symbol   meaning
    D        the dataset: n instances, indexed 0 … n−1
    G        number of groups, min(64, n)
    n_g      instances in group g; sizes differ by at most one when 64 does not divide n
    θ̂       the measure evaluated on all of D
    θ_(g)    the measure evaluated on D without group g (a *replicate*)

The groups depend on the instance index alone, never on shards, batches or workers, so the error
is as independent of how the work was split as the value is. With these weights SE² of a plain
mean of independent instances is unbiased exactly, whatever the group sizes; the equal-weight
formula is so for equal groups only (the difference is small while sizes differ by one).

The jackknife gives the error due to *which instances* are in D. It holds for smooth functions
of means (entropies, ratios); for a count such as the dormant share it is an approximation.

Numpy only, so that reports can use it without torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_GROUPS", "group_of", "group_sizes", "paired_difference", "standard_error"]

NUM_GROUPS = 64

Array = npt.NDArray[np.float64]


def group_of(index: Any, num_instances: int) -> Any:
    """Jackknife group of an instance: ``index * G // num_instances``, G = min(64, num_instances).

    Groups are contiguous and fixed by the index in D.

    Args:
        index: int, or an integer array or tensor of instance indices in [0, num_instances).
        num_instances: size of the whole dataset D (not of a shard).

    Returns:
        The same type and shape as ``index``, values in [0, G).
    """
    return index * min(NUM_GROUPS, num_instances) // num_instances


def group_sizes(num_instances: int) -> npt.NDArray[np.int64]:
    """Instances in each of the G groups, int64 [G]; they sum to ``num_instances``.

    Raises:
        ValueError: ``num_instances`` is below 1.
    """
    if num_instances < 1:
        raise ValueError(f"num_instances is {num_instances}; a dataset has at least 1 instance")
    groups = group_of(np.arange(num_instances, dtype=np.int64), num_instances)
    return np.bincount(groups, minlength=min(NUM_GROUPS, num_instances)).astype(np.int64)


def standard_error(value: npt.ArrayLike, replicates: npt.ArrayLike, sizes: npt.ArrayLike) -> Array:
    """Jackknife standard error of a measure.

    Args:
        value: [...] the measure on all instances.
        replicates: [..., G] the measure without group g.
        sizes: [G] instances in each group; a group of size 0 is left out.

    Returns:
        float64 [...]; NaN where fewer than two groups have instances (no error can be had) or
        where the value or a replicate is not finite.

    Raises:
        ValueError: the last axis of ``replicates`` is not as long as ``sizes``.
    """
    theta = np.asarray(value, dtype=np.float64)
    left_out = np.asarray(replicates, dtype=np.float64)
    n_g = np.asarray(sizes, dtype=np.float64)
    if left_out.shape != (*theta.shape, *n_g.shape):
        raise ValueError(
            f"replicates have shape {left_out.shape}; expected {(*theta.shape, *n_g.shape)}: "
            "one per group on the last axis"
        )
    filled = n_g > 0
    left_out, n_g = left_out[..., filled], n_g[filled]
    num_groups = n_g.size
    if num_groups < 2:
        return np.full(theta.shape, np.nan)
    h = n_g.sum() / n_g
    # In terms of δ_g = θ̂ − θ_(g): τ_g − θ_J = (h_g − 1) δ_g − Σ_k (1 − n_k/n) δ_k. Algebraically
    # the same as the formula above, without the cancellation of G θ̂ against Σ θ_(g).
    delta = theta[..., None] - left_out
    mean_shift = ((1.0 - 1.0 / h) * delta).sum(axis=-1, keepdims=True)
    deviation = (h - 1.0) * delta - mean_shift
    return np.asarray(np.sqrt((deviation**2 / (h - 1.0)).mean(axis=-1)))


def paired_difference(
    value_a: npt.ArrayLike,
    replicates_a: npt.ArrayLike,
    value_b: npt.ArrayLike,
    replicates_b: npt.ArrayLike,
    sizes: npt.ArrayLike,
) -> tuple[Array, Array]:
    """Difference b − a of one measure at two checkpoints on the *same* D, and its error.

    The difference itself is jackknifed: what both checkpoints share (easy and hard instances)
    cancels, so the error is usually far below sqrt(SE_a² + SE_b²).

    Args:
        value_a, value_b: [...] the measure on all instances.
        replicates_a, replicates_b: [..., G] without group g, the groups being the same instances.
        sizes: [G] instances in each group (`group_sizes`).

    Returns:
        (difference, standard error), float64 [...] each.

    Raises:
        ValueError: shapes do not agree.
    """
    a, b = np.asarray(value_a, dtype=np.float64), np.asarray(value_b, dtype=np.float64)
    reps_a = np.asarray(replicates_a, dtype=np.float64)
    reps_b = np.asarray(replicates_b, dtype=np.float64)
    if a.shape != b.shape or reps_a.shape != reps_b.shape:
        raise ValueError(
            f"cannot pair values of shapes {a.shape} and {b.shape} with replicates of shapes "
            f"{reps_a.shape} and {reps_b.shape}"
        )
    difference = b - a
    return difference, standard_error(difference, reps_b - reps_a, sizes)
