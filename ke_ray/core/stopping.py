"""How many instances a wanted precision of a curve needs: the stopping rule of a scan.

A scan with a wanted precision scores all checkpoints of a series on the same few instances spread
over D, then on more of them, until the paired error is small enough:

    rounds   n_k = ⌈N / 2^k⌉ instances: every 2^k-th of D, at least 64 and at least N/32
    error    e = max_c SE(H_c − H_first), paired (`ke_ray.core.jackknife`)
    change   r = max_c H_c − min_c H_c
    stop     e ≤ precision · r (or stderr_nats), or n = N
    else     go to the smallest n' > n with 1.1 · e · √(n/n') ≤ the wanted error, or to N

The instances of a round are among those of every later one, and the rule sees values alone, so it
is as independent of batches, scorers and restarts as values are. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ke_ray.core.jackknife import standard_error

_LEAST_INSTANCES = 64  # one for each jackknife group
_LARGEST_STRIDE = 32
_MARGIN = 1.1  # an error from 64 groups is itself known to about a tenth


@dataclass(frozen=True)
class CurvePrecision:
    """What a curve of one measure is known to, in the measure's unit.

    Attributes:
        change: largest difference between two checkpoints, r.
        error: largest paired error of a checkpoint's difference to the first, e.
    """

    change: float
    error: float

    def wanted_error(self, *, share: float | None, absolute: float | None) -> float:
        """The error to reach: ``absolute``, or ``share`` of the change."""
        if absolute is not None:
            return absolute
        assert share is not None
        return share * self.change

    def instances_needed(self, num_instances: int, wanted_error: float) -> float:
        """About how many instances have the wanted error: n · (e / wanted)²."""
        if wanted_error <= 0:
            return math.inf
        return num_instances * (self.error / wanted_error) ** 2


def curve_precision(
    values: npt.ArrayLike, replicates: npt.ArrayLike, sizes: npt.ArrayLike
) -> CurvePrecision:
    """Precision of a curve whose checkpoints were scored on the same instances.

    Args:
        values: [C] the measure at each checkpoint, in training order; C ≥ 2.
        replicates: [C, G] the measure without group g.
        sizes: [G] instances in each group.
    """
    curve = np.asarray(values, dtype=np.float64)
    left_out = np.asarray(replicates, dtype=np.float64)
    errors = standard_error(curve[1:] - curve[0], left_out[1:] - left_out[0], sizes)
    return CurvePrecision(float(np.ptp(curve)), float(errors.max()))


def round_strides(num_instances: int) -> dict[int, int]:
    """Instances of each possible round → its stride through D, fewest instances first."""
    strides = {num_instances: 1}
    stride = 2
    while stride <= _LARGEST_STRIDE and -(-num_instances // stride) >= _LEAST_INSTANCES:
        strides[-(-num_instances // stride)] = stride
        stride *= 2
    return dict(sorted(strides.items()))


def next_round(
    num_instances: int, most: int, precision: CurvePrecision, wanted_error: float
) -> int | None:
    """Instances of the round after one of ``num_instances``; None to stop.

    Args:
        most: N; no round has more.
        precision: what the round that is over has shown.
        wanted_error: see ``CurvePrecision.wanted_error``. An error that is not finite (no two
            groups) is never small enough.
    """
    if num_instances >= most or precision.error <= wanted_error:
        return None
    later = [count for count in round_strides(most) if count > num_instances]
    needed = _MARGIN**2 * precision.instances_needed(num_instances, wanted_error)
    return next((count for count in later if count >= needed), most)
