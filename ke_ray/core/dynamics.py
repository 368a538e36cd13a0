"""Dynamics of injected knowledge: effectivity, retainability and decay.

    LAM(i)              = argmax of ℓ(t) for t in (t_i, t_i + W]      W = 50 steps
    effectivity_i       = ℓ(LAM(i)) − ℓ(t_i)
    retainability_i(t)  = (ℓ(LAM(i) + t) − ℓ(t_i)) / effectivity_i
    retainability_i(t) ≈ b − a ln t                                   a: decay constant

Source: Chang et al. 2024, arXiv 2406.11813 (LAM: local acquisition maximum).

    symbol   meaning
    ℓ(t)     mean log probability of the probes' targets (nats per token) in state t
    t        a state of the model, counted in completed updates
    s_i      the step whose batch holds injection i, counted from 1
    t_i      s_i − 1: the state that *enters* step s_i and has not yet seen injection i

Choices, where the source assumes a probe at every step:

* ℓ(t_i) is the last probe at or before t_i. A probe at s_i itself already holds the injection.
* Probes at or after s_{i+1} belong to the next injection: neither LAM nor retainability uses them,
  also where W reaches further.
* A maximum needs a probe beyond the injecting update: where no probe lies after s_i, within W and
  before the next injection, injection i has no dynamics. So an injection at the last step of a run
  has none.
* Retainability and decay are undefined (NaN, no points) where effectivity ≤ 0. The fit is ordinary
  least squares in ln t over points with t > 0, and needs two different t.

Numpy and scipy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ke_ray.core.acquisition import Interval
from ke_ray.core.intervals import hall_interval

LAM_WINDOW = 50

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InjectionDynamics:
    """Effectivity, retainability and decay of one injection.

    Attributes:
        step: s_i, counted from 1.
        baseline_step: completed updates at the probe used for ℓ(t_i); None without dynamics.
        lam_step: completed updates at LAM(i); None without dynamics.
        effectivity: nats per token; NaN without dynamics.
        lags: int64 [K] steps after LAM(i), above 0, ascending; empty where effectivity ≤ 0.
        retainability: float64 [K], a share of effectivity, at each lag.
        decay: a of the fit to these points, per e-fold of steps; NaN without two different lags.
    """

    step: int
    baseline_step: int | None
    lam_step: int | None
    effectivity: float
    lags: npt.NDArray[np.int64]
    retainability: Array
    decay: float


def dynamics(
    steps: npt.ArrayLike,
    values: npt.ArrayLike,
    injection_steps: Sequence[int],
    *,
    window: int = LAM_WINDOW,
) -> tuple[InjectionDynamics, ...]:
    """Effectivity, retainability and decay of every injection, from probes along a run.

    Args:
        steps: [S] completed updates at each probe, ascending (0 is the starting checkpoint).
        values: [S] ℓ at each probe: mean over the probes that the injections are about.
        injection_steps: s_i of each injection, counted from 1, ascending.
        window: W, the number of steps after t_i among which LAM is.

    Returns:
        One entry per injection, in order.

    Raises:
        ValueError: shapes differ, steps or injections do not ascend, or window is below 1.
    """
    probe_steps, curve = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    injections = np.asarray(injection_steps, dtype=np.int64)
    if probe_steps.ndim != 1 or probe_steps.shape != curve.shape:
        raise ValueError(
            f"steps of shape {probe_steps.shape} and values of shape {curve.shape} differ"
        )
    if (np.diff(probe_steps) <= 0).any() or (np.diff(injections) <= 0).any() or window < 1:
        raise ValueError("probe steps and injection steps must ascend and window be at least 1")
    ends = [*injections[1:].tolist(), math.inf]
    return tuple(
        _one_injection(probe_steps, curve, int(step), end, window)
        for step, end in zip(injections, ends, strict=False)
    )


def decay_constant(lags: npt.ArrayLike, retainability: npt.ArrayLike) -> float:
    """a of the least-squares fit retainability ≈ b − a ln t.

    Args:
        lags: [K] t > 0, steps after LAM.
        retainability: [K].

    Returns:
        a, the share of effectivity lost per e-fold of steps: positive where knowledge decays; NaN
        without two different lags.
    """
    t, y = np.asarray(lags, dtype=np.float64), np.asarray(retainability, dtype=np.float64)
    if np.unique(t).size < 2:
        return math.nan
    x = np.log(t) - np.log(t).mean()
    return float(-(x * (y - y.mean())).sum() / (x**2).sum())


def effectivity_intervals(
    steps: npt.ArrayLike,
    paragraph_values: npt.ArrayLike,
    injections: Sequence[InjectionDynamics],
    *,
    level: float = 0.95,
) -> tuple[Interval, ...]:
    """Hall's interval of each effectivity over paragraphs.

    Effectivity is a mean over paragraphs of what each gains up to LAM(i); that LAM(i) is the
    maximum of these same paragraphs changes it to second order only. An injection of *once* facts
    is about few paragraphs (the paper's about six), whose gains are skewed: percentiles of a
    bootstrap are far too narrow for them, and Student's interval lies too low.

    Args:
        steps: [S] completed updates at each probe.
        paragraph_values: [S, n_paragraphs] mean ℓ of each paragraph at each probe.
        injections: `dynamics` of the mean over these paragraphs.

    Returns:
        One per injection; the ends NaN with fewer than two paragraphs.

    Raises:
        ValueError: there are no paragraphs, or not one row for each step.
    """
    values, probe_steps = np.asarray(paragraph_values, dtype=np.float64), np.asarray(steps)
    if values.ndim != 2 or values.shape[1] < 1 or len(values) != len(probe_steps):
        raise ValueError(f"paragraph values have shape {values.shape}; expected [S, n_paragraphs]")
    row = {int(step): number for number, step in enumerate(probe_steps)}
    intervals = []
    for entry in injections:
        ends = None
        if entry.lam_step is not None and entry.baseline_step is not None:
            gains = values[row[entry.lam_step]] - values[row[entry.baseline_step]]
            ends = hall_interval(gains, level)
        intervals.append(Interval(entry.effectivity, *(ends or (math.nan, math.nan))))
    return tuple(intervals)


def _one_injection(
    probe_steps: npt.NDArray[np.int64], curve: Array, step: int, end: float, window: int
) -> InjectionDynamics:
    """The dynamics of the injection at `step`, the next one being at `end`."""
    probes = _probes_of(probe_steps, step, end, window)
    if probes is None:
        no_lags = np.empty(0, dtype=np.int64)
        return InjectionDynamics(step, None, None, math.nan, no_lags, np.empty(0), math.nan)
    baseline, candidates = probes
    lam = int(candidates[np.argmax(curve[candidates])])
    effectivity = float(curve[lam] - curve[baseline])
    later = np.flatnonzero((probe_steps > probe_steps[lam]) & (probe_steps < end))
    if not effectivity > 0.0:  # also where it is NaN
        later = later[:0]
    lags = probe_steps[later] - probe_steps[lam]
    retainability = (curve[later] - curve[baseline]) / effectivity if later.size else np.empty(0)
    return InjectionDynamics(
        step=step,
        baseline_step=int(probe_steps[baseline]),
        lam_step=int(probe_steps[lam]),
        effectivity=effectivity,
        lags=lags,
        retainability=retainability,
        decay=decay_constant(lags, retainability),
    )


def _probes_of(
    probe_steps: npt.NDArray[np.int64], step: int, end: float, window: int
) -> tuple[int, npt.NDArray[np.intp]] | None:
    """Indices of the baseline probe and of the candidates for LAM; None without dynamics."""
    before = np.flatnonzero(probe_steps < step)
    # States t_i < t ≤ t_i + W with t_i = step − 1.
    candidates = np.flatnonzero(
        (probe_steps >= step) & (probe_steps <= step - 1 + window) & (probe_steps < end)
    )
    if before.size == 0 or candidates.size == 0 or probe_steps[candidates[-1]] == step:
        return None
    return int(before[-1]), candidates
