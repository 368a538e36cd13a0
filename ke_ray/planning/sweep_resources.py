"""How many trials run at once, and with what: never more than the cluster can hold.

Ray would wait for ever for a trial that fits on no node, and trials that hold what their own
workers wait for would wait for each other. So the number is computed here from the nodes, and what
can never fit is refused before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ke_ray.errors import ConfigError
from ke_ray.studies.sweep import SweepStudy

__all__ = ["TrialResources", "trial_resources"]


@dataclass(frozen=True)
class TrialResources:
    """What every trial gets.

    Attributes:
        concurrency: trials at once.
        cpus, gpus: of the trial's actor (one worker), or of each of its Ray Train workers.
    """

    concurrency: int
    cpus: int
    gpus: float


def trial_resources(
    study: SweepStudy, nodes: Sequence[Mapping[str, float]], num_trials: int
) -> TrialResources:
    """Divide a cluster among trials.

    Args:
        nodes: resources of each node that is alive (``CPU``, ``GPU``).
        num_trials: trials to run; no use in more places.

    Raises:
        ConfigError: a trial asks for more than the cluster, or a node of it, has.
    """
    num_workers = study.base.num_workers
    cpus_of = [int(node.get("CPU", 0)) for node in nodes]
    gpus_of = [float(node.get("GPU", 0)) for node in nodes]
    gpus = _gpus(study, sum(gpus_of), num_workers)
    wanted = max(1, min(study.max_concurrent or num_trials, num_trials))
    cpus = _asked_cpus(study, num_workers)
    if cpus is None:
        # As many at once as there are CPUs, or GPUs, for; then each as many CPUs as are left.
        places = _places([min(c, 10**6) for c in cpus_of], gpus_of, 1, gpus) // num_workers
        shared = max(1, min(wanted, places))
        cpus = max(1, min(sum(cpus_of) // (shared * num_workers), max(cpus_of, default=1)))
        while cpus > 1 and _places(cpus_of, gpus_of, cpus, gpus) // num_workers < shared:
            cpus -= 1
    holds = _places(cpus_of, gpus_of, cpus, gpus) // num_workers
    if holds < 1:
        each = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        what = f"{num_workers} workers of {each} each" if num_workers > 1 else each
        has = ", ".join(
            f"{c} CPUs" + (f" and {g:g} GPUs" if g else "")
            for c, g in zip(cpus_of, gpus_of, strict=True)
        )
        raise ConfigError(
            f"one trial asks for {what}, more than the cluster's nodes have ({has}); lower "
            "cpus_per_trial, gpus_per_trial or base.num_workers, or add nodes."
        )
    return TrialResources(min(wanted, holds), cpus, gpus)


def _gpus(study: SweepStudy, total: float, num_workers: int) -> float:
    """GPUs of a trial's actor, or of one worker."""
    if study.gpus_per_trial is None:
        if study.base.use_gpu is False or (study.base.use_gpu is None and total < num_workers):
            return 0.0
        return 1.0
    gpus = study.gpus_per_trial
    if num_workers > 1 and gpus not in (0.0, float(num_workers)):
        raise ConfigError(
            f"gpus_per_trial is {gpus:g}, but a trial of {num_workers} workers has none or one "
            f"for each; give 0 or {num_workers}."
        )
    return gpus / num_workers


def _asked_cpus(study: SweepStudy, num_workers: int) -> int | None:
    if study.cpus_per_trial is None:
        return study.base.cpus_per_worker if num_workers > 1 else None
    if study.cpus_per_trial < num_workers:
        raise ConfigError(
            f"cpus_per_trial is {study.cpus_per_trial}, fewer than the {num_workers} workers of a "
            f"trial; give at least {num_workers}."
        )
    return study.cpus_per_trial // num_workers


def _places(cpus_of: Sequence[int], gpus_of: Sequence[float], cpus: int, gpus: float) -> int:
    """Bundles of that size that all nodes hold together."""
    total = 0
    for node_cpus, node_gpus in zip(cpus_of, gpus_of, strict=True):
        places = node_cpus // cpus
        if gpus:
            places = min(places, math.floor(node_gpus / gpus + 1e-9))
        total += places
    return total
