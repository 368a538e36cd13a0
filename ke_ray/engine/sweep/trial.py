"""One trial of a sweep, as it runs in its actor.

With one worker the run is done here, in the actor, which is then used again for the next trial
(importing torch and starting an actor take longer than a small run). With more the actor only
waits for the Ray Train workers that do it. Either way it is ``run_continual``, which writes the
row; an exception is tried again here, and after ``retries`` of them becomes a failed row. Deaths
of the process count as attempts too.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.engine.cluster.metrics import TrainingMeter
from ke_ray.engine.cluster.placement import granted_device
from ke_ray.errors import KeRayError, TrainingError
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.parts import TrackingSettings
from ke_ray.training.runs import RunSpec, part_folder, read_row, run_key, write_failed

if TYPE_CHECKING:
    from ke_ray.planning.trials import Trial
    from ke_ray.training.parallel import Worker
    from ke_ray.training.snapshot import Snapshot

__all__ = [
    "STOPPED_TAG",
    "TIME",
    "VALUE",
    "Handout",
    "config_of_trial",
    "run_trial",
    "study_of",
    "told",
]

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
    from ke_ray.checkpoints.reference import CheckpointRef

    study = ContinualStudy.model_validate(config["study"])
    return study, RunSpec(config["name"], CheckpointRef(**config["ref"]), config["seed"])


def told(error: BaseException) -> str:
    """An exception as the ``error`` of a row."""
    text = str(error).strip()
    return text if isinstance(error, KeRayError) else f"{type(error).__name__}: {text}"[:2000]


class Handout:
    """An actor that holds the configs of trials.

    Tune writes what it passes to a trial into files of its own, and sources may hold a login. So
    Tune passes a name.
    """

    def __init__(self) -> None:
        self._configs: dict[str, dict[str, Any]] = {}

    def put(self, name: str, config: dict[str, Any]) -> None:
        """Leave the config of a trial."""
        self._configs[name] = config

    def get(self, name: str) -> dict[str, Any]:
        """The config of a trial."""
        return self._configs[name]


def run_trial(named: dict[str, str], handout: Any, environment: Mapping[str, str]) -> None:
    """Tune's trainable.

    Args:
        named: ``trial``, the name of a config in the handout: what :func:`config_of_trial` makes,
            with ``cwd``, ``threads``, ``retries``, ``command`` (names the command that
            runs the sweep), ``parent_id`` and ``watch`` (whether a scheduler wants intermediate
            results).
        handout: the :class:`Handout`.
        environment: variables that are not to be written down (MLflow's credentials).
    """
    import ray
    from ray import tune

    config = ray.get(handout.get.remote(named["trial"]))
    os.environ.update(environment)
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])  # relative paths mean what they mean to the driver
    import ke_ray.training.continual  # noqa: F401  (seconds, which are the actor's, not a trial's)

    study, spec = study_of(config)
    attempts = _Attempts(study, spec, config["command"], config["retries"])
    while True:
        if not attempts.begin():
            break
        try:
            _execute(study, spec, config, tune.report)
            break
        except SystemExit:  # the scheduler's: raised in tune.report
            _finish_stopped(study, spec, config["parent_id"])
            raise
        except Exception as error:
            log.warning("trial %s failed: %s", spec.name, error, exc_info=True)
            write_failed(study, spec, told(error), fit=config["command"])
    row = read_row(study, spec)
    tune.report({"status": row["status"] if row else "failed"})


class _Attempts:
    """How often a command has begun a trial, counted where a killed process leaves it."""

    def __init__(self, study: ContinualStudy, spec: RunSpec, command: str, retries: int) -> None:
        self.study, self.spec = study, spec
        self.path = storage.join(part_folder(study, spec), "attempts.json")
        self.command, self.allowed = command, retries + 1

    def begin(self) -> bool:
        """Whether another attempt is due; counts it."""
        known = storage.read_json(self.path) if storage.exists(self.path) else {}
        count = known.get("count", 0) if known.get("command") == self.command else 0
        row = read_row(self.study, self.spec)
        if row is not None and row["status"] == "ok":
            return False
        if count >= self.allowed:
            if row is None or row.get("fit") != self.command:
                text = f"The trial's process died {count} times."
                write_failed(self.study, self.spec, text, fit=self.command)
            return False
        told = {"command": self.command, "count": count + 1, "begun_at": time.time()}
        storage.write_json(self.path, told)
        return True


def _execute(
    study: ContinualStudy, spec: RunSpec, config: Mapping[str, Any], report: Report
) -> None:
    watch = report if config["watch"] else None
    if study.num_workers > 1:
        _on_train_workers(study, spec, config["parent_id"], watch)
        return
    import torch

    from ke_ray.training.continual import run_continual
    from ke_ray.training.parallel import Worker

    device, problem = granted_device()
    if problem is not None:
        raise TrainingError(f"{problem}.")
    torch.set_num_threads(config["threads"])
    probes = _Probes(watch)
    meter = TrainingMeter(study, spec.name, probes.on_progress, probes)
    run_continual(
        study,
        spec,
        Worker(device=device),
        meter,
        parent_id=config["parent_id"],
        on_probes=meter.probes,
    )


class _Probes:
    """Turns probes on the way into what a scheduler compares: A by then, and the time."""

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.num_steps = 0
        self.start: float | None = None

    def on_progress(self, progress: Any, **more: Any) -> None:
        """Learns how long the run is."""
        self.num_steps = progress.num_steps

    def __call__(self, step: int, found: Snapshot) -> None:
        """The probes were asked after ``step`` steps."""
        if self.report is None or found.knowledge is None:
            return
        if self.start is None:
            self.start = found.knowledge
        if step and self.num_steps:
            gained = (found.knowledge - self.start) / abs(self.start)
            time = 100.0 * step / self.num_steps
            self.report({TIME: time, VALUE: gained, "step": step})


def _on_train_workers(
    study: ContinualStudy, spec: RunSpec, parent_id: str | None, report: Report | None
) -> None:
    """Run on ``study.num_workers`` Ray Train workers."""
    from ke_ray.engine.train.trainer import fit

    folder = storage.join(part_folder(study, spec), "ray")
    probes = storage.join(storage.absolute(part_folder(study, spec)), "watched.json")
    stop = storage.join(storage.absolute(part_folder(study, spec)), "stop.json")
    for path in (probes, stop):
        storage.remove(path)
    payload = {"study": study, "spec": spec, "parent_id": parent_id}
    payload |= {"probes": probes if report else None, "stop": stop}
    if report is None:
        fit(_train_worker, payload, study, folder)
        return
    # Tune's report has to come from this thread, which it may end: training waits in another.
    failure: list[BaseException] = []

    def train() -> None:
        try:
            fit(_train_worker, payload, study, folder)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=train, name="trial-fit", daemon=True)
    thread.start()
    shown = 0
    try:
        while thread.is_alive():
            thread.join(0.5)
            known = storage.read_json(probes) if storage.exists(probes) else []
            for entry in known[shown:]:
                report(entry)
            shown = len(known)
    except SystemExit:
        storage.write_json(stop, {})
        thread.join(60)
        raise
    if failure:
        raise failure[0]


def _train_worker(
    payload: dict[str, Any], worker: Worker, on_progress: Callable[..., None]
) -> None:
    """The run on one of the Ray Train workers."""
    from ke_ray.training.continual import run_continual

    left: list[dict[str, Any]] = []

    def leave(entry: dict[str, Any]) -> None:
        if storage.exists(payload["stop"]):
            raise KeRayError("Stopped by the scheduler.")
        left.append(entry)
        storage.write_json(payload["probes"], left)

    probes = _Probes(leave if payload["probes"] and worker.is_main else None)

    def show(progress: Any, **more: Any) -> None:
        probes.on_progress(progress)
        on_progress(progress, **more)

    meter = TrainingMeter(payload["study"], payload["spec"].name, show, probes)
    run_continual(
        payload["study"],
        payload["spec"],
        worker,
        meter,
        parent_id=payload["parent_id"],
        on_probes=meter.probes,
    )


def _finish_stopped(study: ContinualStudy, spec: RunSpec, parent_id: str | None) -> None:
    """A trial that a scheduler ended is finished in MLflow, neither failed nor killed."""
    from ke_ray.tracking.tracker import Tracker

    settings: TrackingSettings = study.mlflow
    with Tracker(settings, deferred=True) as tracker:
        run = tracker.run(tracker.find_run(run_key(study, spec, parent_id)))
        run.set_tags({STOPPED_TAG: "asha"})
        run.finish("FINISHED")
