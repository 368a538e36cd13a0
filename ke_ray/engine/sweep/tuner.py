"""Ray Tune's tuner for a sweep: resources, scheduler, and nothing kept."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.engine.sweep.resources import TrialResources
from ke_ray.engine.sweep.trial import TIME, VALUE, run_trial
from ke_ray.studies.sweep import SweepStudy

if TYPE_CHECKING:
    from ke_ray.engine.sweep.search import LedgerSearcher

__all__ = ["ENVIRONMENT", "build_tuner", "scratch"]

#: Read by Tune on the driver and in its actors.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json and TensorBoard files of each trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is an exception here, as SIGTERM is
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's own state is not used
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a stopped trial closes its MLflow run
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last word is no metric
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def build_tuner(
    study: SweepStudy,
    searcher: LedgerSearcher,
    resources: TrialResources,
    place: str,
    num_trials: int,
    command: str,
    handout: Any,
) -> Any:
    """The tuner over what is missing of a sweep; nothing starts before ``fit``.

    Args:
        place: a local folder for what Tune insists on writing.
        num_trials: what the searcher hands out in all.
        command: names this command's files in ``place``.
        handout: the actor that has the trials' configs.
    """
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    # It warns of every trial whose metrics it cannot read back, and there is nothing to read.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scheduler = None
    if study.scheduler is not None:
        scheduler = AsyncHyperBandScheduler(
            time_attr=TIME,
            metric=VALUE,
            mode="max",
            max_t=100.0,
            grace_period=100.0 * study.scheduler.grace,
            reduction_factor=study.scheduler.reduction_factor,
            stop_last_trials=False,  # what is measured after the last step is still to come
        )
    environment = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}
    if study.base.num_workers == 1:
        asked: dict[str, float] = {"cpu": resources.cpus}
        if resources.gpus:
            asked["gpu"] = resources.gpus
    else:
        # The actor only waits for its workers. It needs something of Ray's, or Tune refuses it,
        # and no CPU, or it would hold what they wait for: a byte of memory, which every node has.
        asked = {"cpu": 0, "memory": 1}
    trainable = tune.with_parameters(run_trial, handout=handout, environment=environment)
    return tune.Tuner(
        tune.with_resources(trainable, asked),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=num_trials,
            max_concurrent_trials=resources.concurrency,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{command}",
            storage_path=place,
            failure_config=tune.FailureConfig(max_failures=study.retries),
            verbose=0,
        ),
    )


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


@contextmanager
def scratch(output: str) -> Iterator[str]:
    """A local folder for Tune's files, removed afterwards."""
    if storage.is_local(output):
        place = Path(storage.local_path(output)).absolute() / "ray"
        place.mkdir(parents=True, exist_ok=True)
    else:
        place = Path(tempfile.mkdtemp(prefix="ke_ray-sweep-"))
    try:
        yield str(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
