"""Delete-a-group jackknife over fixed groups of instances.

    w_g  = 1 − n_g/n
    SE²  = Σ_g w_g (θ_(g) − θ̄)²,   θ̄ = Σ_g w_g θ_(g) / Σ_g w_g

With equal groups it is the usual (G − 1)/G Σ (θ_(g) − mean θ_(·))². For groups of other sizes the
weights make SE² of a plain mean unbiased exactly where instances are independent, and right for
large G where a group is a cluster of instances that are alike (a long document): a group counts
with the square of its size. The weights of Busing, Meijer & van der Leeden (Statistics and
Computing 9, 1999, 3–8), which count it with its size, have the first property and not the second.

    symbol   meaning
    D        the dataset: n instances, indexed 0 … n−1
    G        number of groups, min(64, n) or fewer
    n_g      instances in group g
    θ̂       the measure evaluated on all of D
    θ_(g)    the measure evaluated on D without group g (a *replicate*)

Groups are contiguous, and their sizes belong to D: by default as equal as can be (sizes differ by
at most one), and where instances of one document are neighbours in D such that no document is cut
in two (`document_groups`), since parts of one document are alike and groups must be independent.
They never depend on shards, batches or workers, so the error is as independent of how the work was
split as the value is.

The jackknife gives the error due to *which instances* are in D. It holds for smooth functions
of means (entropies, ratios), not for a count such as the dormant share, which gets no error.

Numpy and scipy only, so that reports can use it without torch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ke_ray.core.intervals import student_quantile

NUM_GROUPS = 64
_LEAST_WORTH = 10.0  # equal groups; an error from fewer is worth less than one of cut documents

Array = npt.NDArray[np.float64]


def group_of(index: Any, num_instances: int) -> Any:
    """Group of an instance, of equal groups: ``index * G // num_instances``, G = min(64, n).

    Args:
        index: int, or an integer array or tensor of instance indices in [0, num_instances).
        num_instances: size of the whole dataset D (not of a shard).

    Returns:
        The same type and shape as ``index``, values in [0, G).
    """
    return index * min(NUM_GROUPS, num_instances) // num_instances


def group_sizes(num_instances: int) -> npt.NDArray[np.int64]:
    """Instances in each of min(64, n) equal groups, int64 [G]; they sum to ``num_instances``.

    Raises:
        ValueError: ``num_instances`` is below 1.
    """
    if num_instances < 1:
        raise ValueError(f"num_instances is {num_instances}; a dataset has at least 1 instance")
    groups = group_of(np.arange(num_instances, dtype=np.int64), num_instances)
    return np.bincount(groups, minlength=min(NUM_GROUPS, num_instances)).astype(np.int64)


def document_groups(first: npt.ArrayLike, last: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Sizes of contiguous groups, as equal as can be, that share no document.

    The boundaries of equal groups move to the nearest instances between which a document ends.
    Where too many of them meet there (documents are few and long, or one ends nowhere near), the
    groups stay equal and cut documents: `cut_document_factor` tells what that does to errors.

    Args:
        first, last: [n] the document at the beginning and at the end of each instance, ascending.

    Returns:
        int64 [G], n_g of each group. (Σn)²/Σn², the number of equal groups that would be worth as
        much, is at least 10 (half of n, where n < 20) unless documents are cut.
    """
    begins, ends = np.asarray(first), np.asarray(last)
    equal = group_sizes(len(begins))
    allowed = np.flatnonzero(begins[1:] > ends[:-1]) + 1
    if not allowed.size:
        return equal
    ideal = np.cumsum(equal)[:-1]
    above = np.searchsorted(allowed, ideal).clip(max=allowed.size - 1)
    below = (above - 1).clip(min=0)
    nearer = np.abs(allowed[below] - ideal) <= np.abs(allowed[above] - ideal)
    bounds = np.unique(np.where(nearer, allowed[below], allowed[above]))
    sizes = np.diff(np.concatenate([[0], bounds, [len(begins)]])).astype(np.int64)
    worth = len(begins) ** 2 / float((sizes**2).sum())
    return sizes if worth >= min(_LEAST_WORTH, len(equal) / 2) else equal


def cut_document_factor(sizes: npt.ArrayLike, document: npt.ArrayLike) -> float:
    """How many times too small errors are, at worst, because groups cut documents.

    √(Σ_d n_d² / Σ_d Σ_g n_dg²), with n_dg instances of document d in group g and n_d in all: right
    for instances that are the same within a document and independent between documents. 1 where no
    document is in two groups.

    Args:
        sizes: [G] instances in each group.
        document: [n] the document that each instance is (mostly) from.
    """
    n_g = np.asarray(sizes)
    group = np.repeat(np.arange(n_g.size), n_g)
    _, number = np.unique(np.asarray(document), return_inverse=True)
    whole = np.bincount(number)
    pieces = np.bincount(number * n_g.size + group)
    return float(np.sqrt((whole**2).sum() / (pieces**2).sum()))


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
    if n_g.size < 2:
        return np.full(theta.shape, np.nan)
    weight = 1.0 - n_g / n_g.sum()
    delta = theta[..., None] - left_out  # without the cancellation of large values in their mean
    centre = (weight * delta).sum(axis=-1, keepdims=True) / weight.sum()
    return np.asarray(np.sqrt((weight * (delta - centre) ** 2).sum(axis=-1)))


def critical_t(sizes: npt.ArrayLike) -> float:
    """How many standard errors on either side are a 95 % interval: Student's t of few groups.

    The degrees of freedom are (Σn)²/Σn² − 1, G − 1 where groups are equal: 2.00 errors for 64
    groups, 2.26 for ten, of which 1.96 errors hold the truth in 92 % only.

    Args:
        sizes: [G] instances in each group.

    Returns:
        NaN for fewer than two groups.
    """
    n_g = np.asarray(sizes, dtype=np.float64)
    worth = n_g.sum() ** 2 / (n_g**2).sum() if n_g.any() else 0.0
    return student_quantile(float(worth) - 1.0) if worth > 1.0 else math.nan


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
        sizes: [G] instances in each group (`group_sizes`; of a scan, in its manifest).

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
