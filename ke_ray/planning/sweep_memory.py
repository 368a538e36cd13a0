"""Whether the trials of a sweep fit the devices (``ke_ray.planning.memory_forecast``)."""

from __future__ import annotations

from ke_ray.planning.memory_forecast import (
    Device,
    check_fit,
    config_of,
    describe,
    find_device,
    is_finished,
    measure_of,
)
from ke_ray.planning.sweep import end_points, fixed_points, seeds_of, trial_study
from ke_ray.planning.training_memory import worker_memory
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.sweep import SweepStudy


def sweep_memory_text(study: SweepStudy) -> str:
    """``memory_text`` of the trial that needs the most; asks no network."""
    measure = measure_of(config_of(study.base, offline=True))
    if measure is None:
        return "memory: not known (the checkpoint is not here)"
    largest = max(_trials(study), key=lambda trial: worker_memory(measure(trial), trial).peak)
    return describe(largest, measure, _trial_device(study, largest), prefix="base.")


def check_sweep_memory(study: SweepStudy) -> None:
    """``check_memory`` of every trial."""
    if is_finished(study.output):
        return
    trials = _trials(study)
    devices = [_trial_device(study, trial) for trial in trials]
    if all(device.num_bytes is None for device in devices):
        return
    measure = measure_of(config_of(study.base))
    if measure is not None:
        for trial, device in zip(trials, devices, strict=True):
            check_fit(trial, measure, device, prefix="base.")


def _trials(study: SweepStudy) -> list[ContinualStudy]:
    """One study for each point that is known beforehand, and for the ends of what is drawn."""
    points = [*fixed_points(study), *end_points(study)]
    return [trial_study(study, point, seeds_of(study, point)[0]) for point in points]


def _trial_device(study: SweepStudy, trial: ContinualStudy) -> Device:
    gpus = study.gpus_per_trial
    if gpus is not None:
        trial = trial.model_copy(update={"use_gpu": gpus > 0})
    share = min(1.0, gpus / trial.num_workers) if gpus else 1.0
    return find_device(trial, in_process=False, share=share)
