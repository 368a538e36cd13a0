"""One trial of a sweep, as it runs in its actor.

With one worker the run is done here, in the actor, which is then used again for the next trial
(importing torch and starting an actor take longer than a small run). With more the actor only
waits for the Ray Train workers that do it. Either way ``run_continual`` writes the row of a trial
that succeeds. An exception becomes a failed row, and the same actor tries again; Tune starts the
trial again where its process died. One book counts the attempts of both kinds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ke_ray import storage
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.engine.cluster.metrics import TrainingMeter
from ke_ray.engine.cluster.placement import granted_device
from ke_ray.engine.train.trainer import fit
from ke_ray.errors import TrainingError, row_error
from ke_ray.planning.trials import Trial
from ke_ray.studies.continual import ContinualStudy
from ke_ray.tracking.tracker import open_tracker
from ke_ray.training.continual import run_continual
from ke_ray.training.parallel import Worker
from ke_ray.training.runs import RunSpec, part_folder, read_row, run_key, write_failed
from ke_ray.training.snapshot import Snapshot

log = logging.getLogger(__name__)

STOPPED_TAG = "ke_ray.stopped_early"
#: What intermediate results call the share of a trial's steps (percent), and A by then.
TIME, VALUE = "percent_of_steps", "acquisition_so_far"

Report = Callable[[dict[str, Any]], None]


def config_of_trial(trial: Trial, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray carries to the actor: plain values."""
    return {
        "study": trial.study.model_dump(mode="json", exclude_unset=True),
        "name": trial.spec.name,
        "ref": asdict(trial.spec.ref),
        "seed": trial.spec.seed,
        **settings,
    }


def study_of(config: Mapping[str, Any]) -> tuple[ContinualStudy, RunSpec]:
    """The inverse of :func:`config_of_trial`."""
    study = ContinualStudy.model_validate(config["study"])
    return study, RunSpec(config["name"], CheckpointRef(**config["ref"]), config["seed"])


def run_trial(named: dict[str, str], book: Any, environment: Mapping[str, str]) -> None:
    """Tune's trainable.

    Args:
        named: ``trial``, the name of a config: what :func:`config_of_trial` makes, with ``cwd``,
            ``threads``, ``command`` (names the command that runs the sweep), ``parent_id`` and
            ``watch`` (whether a scheduler wants intermediate results).
        book: handle of the :class:`~ke_ray.planning.trial_book.TrialBook`.
        environment: variables of the driver, not to be written down (MLflow's credentials).
    """
    import ray
    from ray import tune

    os.environ.update(environment)
    while (config := ray.get(book.begin.remote(named["trial"]))) is not None:
        if Path(config["cwd"]).is_dir():
            os.chdir(config["cwd"])  # relative paths mean what they mean to the driver
        study, spec = study_of(config)
        row = read_row(study, spec)
        if row is not None and row["status"] == "ok":
            break  # the process of the last attempt died after its last write
        try:
            _execute(study, spec, config, tune.report)
            break
        except SystemExit:  # the scheduler's: raised in tune.report
            _finish_stopped(study, spec, config["parent_id"])
            raise
        except Exception as error:
            log.warning("trial %s failed: %s", spec.name, error, exc_info=True)
            write_failed(study, spec, row_error(error), fit=config["command"])
    tune.report({"ended": 1})


def _execute(
    study: ContinualStudy, spec: RunSpec, config: Mapping[str, Any], report: Report
) -> None:
    parent_id = config["parent_id"]
    if study.num_workers > 1:
        payload = {"study": study, "spec": spec, "parent_id": parent_id}
        fit(_train_worker, payload, study, storage.join(part_folder(study, spec), "ray"))
        return
    device, problem = granted_device()
    if problem is not None:
        raise TrainingError(f"{problem}.")
    torch.set_num_threads(config["threads"])
    probes = _Probes(report if config["watch"] else None)
    meter = TrainingMeter(study, spec.name, probes.on_progress, probes)
    worker = Worker(device=device)
    run_continual(study, spec, worker, meter, parent_id=parent_id, on_probes=meter.probes)


def _train_worker(
    payload: dict[str, Any], worker: Worker, on_progress: Callable[..., None]
) -> None:
    """The run on one of the Ray Train workers."""
    study, spec, parent_id = payload["study"], payload["spec"], payload["parent_id"]
    meter = TrainingMeter(study, spec.name, on_progress)
    run_continual(study, spec, worker, meter, parent_id=parent_id, on_probes=meter.probes)


class _Probes:
    """Turns probes on the way into what a scheduler compares: A by then, and the time."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.num_steps = 0
        self.start: float | None = None

    def on_progress(self, progress: Any, **more: Any) -> None:
        """Learns how long the run is."""
        self.num_steps = progress.num_steps

    def __call__(self, step: int, snapshot: Snapshot) -> None:
        """The probes were evaluated after ``step`` steps."""
        if self.report is None or snapshot.knowledge is None:
            return
        if self.start is None:
            self.start = snapshot.knowledge
        if step and self.num_steps:
            gained = (snapshot.knowledge - self.start) / abs(self.start)
            time = 100.0 * step / self.num_steps
            self.report({TIME: time, VALUE: gained, "step": step})


def _finish_stopped(study: ContinualStudy, spec: RunSpec, parent_id: str | None) -> None:
    """A trial that a scheduler ended is finished in MLflow, neither failed nor killed."""
    with open_tracker(study.mlflow, deferred=True) as tracker:
        run = tracker.run(tracker.find_run(run_key(study, spec, parent_id)))
        run.set_tags({STOPPED_TAG: "asha"})
        run.finish("FINISHED")
