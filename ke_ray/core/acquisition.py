"""Knowledge K, acquisition A and forgetting F, with bootstrap intervals.

    K(θ) = mean over paragraphs of the mean over their probes of ℓ(p; θ)
    A    = (K_CL − K_PT) / |K_PT|                                                   (Eq. 4)
    F    = −(P_CL − P_PT) / P_PT                                                    (Eq. 5)

Source: arXiv 2410.01380. Printed, Eq. 4 divides by K_PT, which is negative and would turn the sign
of every gain; the paper's tables use |K_PT|, and so does this module.

    symbol      meaning
    ℓ(p; θ)     log probability of probe p's target span (nats), per target token for K and A
    K_PT, K_CL  knowledge before (the starting checkpoint) and after continual learning
    P           mean accuracy over downstream tasks, a fraction

Once and paraphrase paragraphs are weighted by their count: K is the plain mean over all of them.

Intervals are bootstrap, seeded, and paired: one resample of paragraphs (or of a task's items)
serves both checkpoints, because both are scored on the same probes. They tell how far the value
depends on the *choice* of paragraphs or items, and nothing about training seeds. How often they
hold the truth was simulated (docs/science.md#coverage): that of A is bootstrap-t, since percentiles
are too narrow for a few skewed paragraphs; that of F has percentiles, with two pseudo-items, since
they are too narrow where few answers change.

Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval, which are NaN where it cannot be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one model on one downstream task.

    Attributes:
        task: its name.
        accuracy: a fraction in [0, 1].
        stderr: its standard error, a fraction; used where `items` is missing on either side.
        items: 0 or 1 for every item, in an order that is the same for every model; or None.
    """

    task: str
    accuracy: float
    stderr: float
    items: npt.ArrayLike | None = None


def paragraph_means(
    values: npt.ArrayLike, paragraphs: Sequence[object] | npt.NDArray[np.generic]
) -> tuple[list[object], Array]:
    """Mean of ℓ over the probes of each paragraph.

    Args:
        values: [n_probes] ℓ of each probe, nats.
        paragraphs: [n_probes] which paragraph each belongs to, any hashable labels.

    Returns:
        (labels in order of first appearance, float64 [n_paragraphs]).

    Raises:
        ValueError: no probes, or another number of labels than of values.
    """
    probe_values = np.asarray(values, dtype=np.float64)
    if probe_values.ndim != 1 or probe_values.size == 0 or len(paragraphs) != probe_values.size:
        raise ValueError(
            f"{probe_values.shape} values and {len(paragraphs)} paragraph labels; expected one "
            "label for each of at least one probe"
        )
    position: dict[object, int] = {}
    index = np.array([position.setdefault(label, len(position)) for label in paragraphs])
    return list(position), np.bincount(index, weights=probe_values) / np.bincount(index)


def knowledge(paragraph_values: npt.ArrayLike) -> float:
    """K: the mean over paragraphs, nats (per token, or whatever unit the values have).

    Args:
        paragraph_values: [n_paragraphs], as from `paragraph_means`, once and paraphrase together.

    Raises:
        ValueError: there is no paragraph.
    """
    values = np.asarray(paragraph_values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("K is a mean over paragraphs, but there are none; give at least one")
    return float(values.mean())


def acquisition(before: float, after: float) -> float:
    """A = (K_CL − K_PT) / |K_PT| (Eq. 4); positive when knowledge was gained, NaN for K_PT = 0."""
    return (after - before) / abs(before) if before != 0.0 else math.nan


def forgetting(before: float, after: float) -> float:
    """F = −(P_CL − P_PT) / P_PT (Eq. 5); positive when accuracy fell, NaN unless P_PT > 0."""
    return -(after - before) / before if before > 0.0 else math.nan


def mean_accuracy(scores: Sequence[TaskScore]) -> float:
    """P: the plain mean of the tasks' accuracies, a fraction.

    Raises:
        ValueError: there is no task.
    """
    if not scores:
        raise ValueError("P is a mean over tasks, but there are none; give at least one")
    return float(np.mean([score.accuracy for score in scores]))


def bootstrap_weights(
    num_paragraphs: int,
    num_resamples: int,
    seed: int,
    strata: Sequence[object] | None = None,
) -> Array:
    """Resamples of paragraphs as weights: a resampled mean is ``weights @ values``.

    Args:
        num_paragraphs: n.
        num_resamples: R.
        seed: of PCG64; the same seed gives the same resamples.
        strata: [n] labels, such as once and paraphrase; paragraphs are then resampled within their
            label, so that every resample has as many of each as the design.

    Returns:
        float64 [R, n]; each row sums to 1 and is (times drawn) / n.

    Raises:
        ValueError: no paragraphs, or labels of another length.
    """
    if num_paragraphs < 1 or (strata is not None and len(strata) != num_paragraphs):
        raise ValueError(
            f"{num_paragraphs} paragraphs with {None if strata is None else len(strata)} labels; "
            "expected at least one paragraph and a label for each"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    members: dict[object, list[int]] = {}
    for index in range(num_paragraphs):
        members.setdefault(None if strata is None else strata[index], []).append(index)
    weights = np.zeros((num_resamples, num_paragraphs))
    for rows in members.values():
        draws = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), num_resamples)
        weights[:, rows] = draws / num_paragraphs
    return weights


def percentile_interval(value: float, draws: npt.ArrayLike, level: float) -> Interval:
    """The interval between the (1 ± level)/2 quantiles of bootstrap draws.

    Draws that are not finite (a resample where the quantity is undefined) do not count; if they
    are half of all or more, or there are no draws, both ends are NaN.
    """
    sample = np.asarray(draws, dtype=np.float64)
    finite = sample[np.isfinite(sample)]
    if 2 * finite.size <= sample.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(finite, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value, float(low), float(high))


def acquisition_interval(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    strata: Sequence[object] | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A with a paired bootstrap-t interval over paragraphs.

    Args:
        before, after: [n_paragraphs] mean ℓ of the same paragraphs in the same order.
        strata: [n_paragraphs] setting of each (once, paraphrase); resampled within it, or all
            together where a setting has fewer than three paragraphs.
        level: coverage, in (0, 1).
        num_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        A of all paragraphs and its interval; NaN ends where there are fewer than four paragraphs.

    Raises:
        ValueError: no paragraphs, or the two differ in shape.
    """
    start, end = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if start.shape != end.shape or start.ndim != 1:
        raise ValueError(f"paragraph values of shapes {start.shape} and {end.shape} do not pair")
    value = acquisition(knowledge(start), knowledge(end))
    if start.size < 4:  # with three, a ninth of the resamples have no spread
        return Interval(value, math.nan, math.nan)
    labels = [None] * start.size if strata is None else list(strata)
    members = [np.flatnonzero([label == own for label in labels]) for own in dict.fromkeys(labels)]
    if min(map(len, members)) < 3:  # half of the resamples of two have no spread
        strata, members = None, [np.arange(start.size)]
    weights = bootstrap_weights(start.size, num_resamples, seed, strata)
    whole = np.full((1, start.size), 1.0 / start.size)
    draws, errors = _acquisition_draws(start, end, np.concatenate([whole, weights]), members)
    error = float(errors[0])
    if error == 0.0:  # every paragraph gains alike
        return Interval(value, value, value)
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = percentile_interval(0.0, (draws[1:] - draws[0]) / errors[1:], level)
    return Interval(value, value - studentised.high * error, value - studentised.low * error)


def _acquisition_draws(
    start: Array, end: Array, weights: Array, members: Sequence[npt.NDArray[np.intp]]
) -> tuple[Array, Array]:
    """A of each row of weights [R, n] and its standard error by linearisation, [R] each.

    SE² = Σ_s (n_s/n)² var_s(u) / n_s, u = (ℓ_CL − ℓ_PT − A sign(K_PT) ℓ_PT) / |K_PT|, over settings
    s. The first row has all paragraphs alike; u is that of its A and a multiple of ℓ_PT, so that
    what is equal in all paragraphs cancels exactly.
    """
    gain, n = end - start, start.size
    k_before = weights @ start
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (weights @ gain) / np.abs(k_before)
    slope = -np.sign(k_before) * value
    residual, change = gain + slope[0] * start, slope - slope[0]
    variance = np.zeros(len(weights))
    for rows in members:
        drawn, r, y = weights[:, rows] * (n / rows.size), residual[rows], start[rows]
        r, y = r - r.mean(), y - y.mean()
        mean = drawn @ r + change * (drawn @ y)
        square = drawn @ r**2 + 2 * change * (drawn @ (r * y)) + change**2 * (drawn @ y**2)
        spread = square - mean**2
        # Where one paragraph alone was drawn, what is left of it is rounding.
        size = drawn @ r**2 + change**2 * (drawn @ y**2)
        spread = np.where(spread > 1e-12 * size, spread, 0.0)
        variance += (rows.size / n) ** 2 * spread / (rows.size - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return value, np.sqrt(variance) / np.abs(k_before)


def forgetting_interval(
    before: Sequence[TaskScore],
    after: Sequence[TaskScore],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """F with a percentile-bootstrap interval over the items of the tasks.

    The tasks are fixed, as in the paper; their items are the sample. A task that has `items` on
    both sides is resampled item by item, the same items before and after (paired), to which one
    pseudo-item that is lost and one that is won are added, divided over the tasks (after Bonett &
    Price 2012, J. Educ. Behav. Stat. 37, 479–488): no change in a few items is no proof that there
    is none. The accuracies
    of any other task are sampled from Normal(accuracy, stderr) cut to [0, 1], before and after
    independently: the pairing is then unknown, and the interval errs on the wide side.

    Args:
        before, after: scores of the same tasks, in any order.
        level, num_resamples, seed: as `acquisition_interval`.

    Returns:
        F and its interval; NaN ends where a needed standard error is NaN, or where half of the
        resamples or more have P_PT = 0.

    Raises:
        ValueError: the tasks differ, or a task has another number of items before and after.
    """
    later = {score.task: score for score in after}
    if sorted(later) != sorted(score.task for score in before) or len(later) != len(after):
        raise ValueError(
            f"tasks before {sorted(score.task for score in before)} and after "
            f"{sorted(score.task for score in after)} differ or repeat"
        )
    value = forgetting(mean_accuracy(before), mean_accuracy(after))
    generator = np.random.Generator(np.random.PCG64(seed))
    p_before, p_after = np.zeros(num_resamples), np.zeros(num_resamples)
    for score in sorted(before, key=lambda score: score.task):
        start, end = _task_draws(
            score, later[score.task], 1 / len(before), num_resamples, generator
        )
        p_before += start / len(before)
        p_after += end / len(before)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = -(p_after - p_before) / p_before
    return percentile_interval(value, draws, level)


def _task_draws(
    before: TaskScore,
    after: TaskScore,
    pseudo_items: float,
    num_resamples: int,
    generator: np.random.Generator,
) -> tuple[Array, Array]:
    """Resampled accuracies of one task before and after, [R] each.

    Args:
        pseudo_items: how many lost ones, and how many won ones, are added to paired items.
    """
    if before.items is None or after.items is None:
        normal = generator.standard_normal((2, num_resamples))
        return (
            np.clip(before.accuracy + before.stderr * normal[0], 0.0, 1.0),
            np.clip(after.accuracy + after.stderr * normal[1], 0.0, 1.0),
        )
    start = np.asarray(before.items, dtype=np.float64)
    end = np.asarray(after.items, dtype=np.float64)
    if start.shape != end.shape or start.ndim != 1 or start.size == 0:
        raise ValueError(
            f"task {before.task!r} has items of shape {start.shape} before and {end.shape} after; "
            "paired items must be the same ones, at least one"
        )
    # Resampling items with replacement is a multinomial draw over the four (before, after)
    # outcomes: exact, and free of an [R, n_items] array.
    counts = np.bincount((2 * start + end).astype(np.int64), minlength=4).astype(np.float64)
    counts[1:3] += pseudo_items  # 0 → 1 and 1 → 0
    draws = generator.multinomial(start.size, counts / counts.sum(), num_resamples) / start.size
    return draws[:, 2] + draws[:, 3], draws[:, 1] + draws[:, 3]
