"""What a study takes, in four numbers: those of ``--dry-run`` that people compare studies by."""

from __future__ import annotations

from dataclasses import dataclass

from ke_ray.planning.scan_forecast import measure_scan
from ke_ray.planning.speed import H100_FLOPS_PER_S
from ke_ray.planning.sweep_forecast import measure_sweep
from ke_ray.planning.training_forecast import (
    bytes_of_starts,
    num_parameters,
    num_tokens,
    training_hours,
)
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import SweepStudy


@dataclass(frozen=True)
class Cost:
    """None where a number cannot be known.

    Attributes:
        num_checkpoints: different checkpoints that are read.
        bytes_to_fetch: of those that are not on this machine.
        num_tokens: scored, or trained on, over all checkpoints, corpora and runs.
        h100_hours: on one H100 at the assumed speeds (``docs/planning.md``). Scans with fetches;
            training without fetches, probes and tasks.
    """

    num_checkpoints: int | None
    bytes_to_fetch: int | None
    num_tokens: int | None
    h100_hours: float | None


def cost_of(study: ScanStudy | ContinualStudy | SweepStudy) -> Cost:
    """The cost of a study. Scans ask the source of their checkpoints; training needs no network.

    Raises:
        UserError: no such checkpoints, or points that make no valid study.
    """
    if isinstance(study, ScanStudy):
        scan = measure_scan(study)
        hours = scan.hours_on_gpus(1)
        return Cost(len(scan.refs), scan.bytes_to_fetch, scan.num_tokens, hours)
    if isinstance(study, SweepStudy):
        sweep = measure_sweep(study)
        hours = _training_hours(study.base, sweep.tokens)
        return Cost(sweep.num_starts, sweep.bytes_to_fetch, sweep.tokens, hours)
    num_starts = len(set(study.starts.nearest)) or study.starts.spread
    size = bytes_of_starts(study, num_starts)
    tokens = num_tokens(study)
    if tokens is None or num_starts is None:
        return Cost(num_starts, size, None, None)
    total = tokens * num_starts * len(study.seeds)
    return Cost(num_starts, size, total, _training_hours(study, total))


def _training_hours(study: ContinualStudy, tokens: int | None) -> float | None:
    parameters, _ = num_parameters(study)
    if tokens is None or parameters is None:
        return None
    return training_hours(parameters, tokens, H100_FLOPS_PER_S[study.precision])
