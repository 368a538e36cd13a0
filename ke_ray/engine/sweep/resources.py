"""Resources of a sweep's trials, and how many run at once: never more than the cluster can hold.

Ray would wait for ever for a trial that fits on no node, and trials that hold what their own
workers wait for would wait for each other. So the number is computed here from the nodes, and what
can never fit is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ke_ray.engine.cluster.placement import (
    count_places,
    describe_nodes,
    describe_resources,
    most_cpus,
    training_nodes,
)
from ke_ray.errors import ConfigError
from ke_ray.studies.sweep import SweepStudy


@dataclass(frozen=True)
class TrialResources:
    """Resources of every trial.

    Attributes:
        concurrency: trials at once.
        cpus, gpus: of the trial's actor (one worker), or of each of its Ray Train workers.
    """

    concurrency: int
    cpus: int
    gpus: float


def sweep_nodes(study: SweepStudy) -> list[dict[str, float]]:
    """The nodes as the sweep's trials count them: :func:`training_nodes`."""
    if study.gpus_per_trial is None:
        return training_nodes(study.base.use_gpu)
    return training_nodes(study.gpus_per_trial > 0)


def trial_resources(
    study: SweepStudy,
    nodes: Sequence[Mapping[str, float]],
    num_trials: int,
    *,
    may_grow: bool = False,
) -> TrialResources:
    """Divide a cluster among trials.

    Args:
        nodes: resources of each node that is alive (``CPU``, ``GPU``).
        num_trials: trials to run; more places than that are of no use.
        may_grow: whether nodes may be added: one trial then waits for those.

    Raises:
        ConfigError: a trial requests more than the cluster, or a node of it, has.
    """
    num_workers = study.base.num_workers
    cpus = _requested_cpus(study, num_workers)
    gpus = _gpus(study, nodes, num_workers)
    most = max(1, min(study.max_concurrent or num_trials, num_trials))
    if cpus is None:
        # As many at once as there are CPUs, or GPUs, for; then each as many CPUs as are left.
        shared = max(1, min(most, count_places(nodes, 1, gpus) // num_workers))
        cpus = max(1, most_cpus(nodes, shared * num_workers, gpus))
    holds = count_places(nodes, cpus, gpus) // num_workers
    if holds < 1 and not may_grow:
        each = describe_resources({"CPU": cpus, "GPU": gpus})
        request = f"{num_workers} workers of {each} each" if num_workers > 1 else each
        raise ConfigError(
            f"One trial requests {request}, more than the cluster's nodes have "
            f"({describe_nodes(nodes)}); lower cpus_per_trial, gpus_per_trial or "
            "base.num_workers, or add nodes."
        )
    return TrialResources(max(1, min(most, holds)), cpus, gpus)


def _gpus(study: SweepStudy, nodes: Sequence[Mapping[str, float]], num_workers: int) -> float:
    """GPUs of a trial's actor, or of one worker."""
    if study.gpus_per_trial is None:
        use_gpu = study.base.use_gpu
        if use_gpu is None:
            use_gpu = any(node.get("GPU") for node in nodes)
        return float(use_gpu)
    gpus = study.gpus_per_trial
    if num_workers > 1 and gpus not in (0.0, float(num_workers)):
        raise ConfigError(
            f"gpus_per_trial is {gpus:g}, but a trial of {num_workers} workers has none or one "
            f"for each; give 0 or {num_workers}."
        )
    return gpus / num_workers


def _requested_cpus(study: SweepStudy, num_workers: int) -> int | None:
    if study.cpus_per_trial is None:
        return study.base.cpus_per_worker if num_workers > 1 else None
    if study.cpus_per_trial < num_workers:
        raise ConfigError(
            f"cpus_per_trial is {study.cpus_per_trial}, fewer than the {num_workers} workers of a "
            f"trial; give at least {num_workers}."
        )
    return study.cpus_per_trial // num_workers
