"""Ray Tune's tuner for a sweep: resources, scheduler, and nothing kept."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from ke_ray import storage
from ke_ray.engine.sweep.resources import TrialResources
from ke_ray.engine.sweep.search import LedgerSearcher
from ke_ray.engine.sweep.trial import TIME, VALUE, run_trial
from ke_ray.studies.sweep import SweepStudy


def build_tuner(
    study: SweepStudy,
    searcher: LedgerSearcher,
    resources: TrialResources,
    folder: str,
    num_trials: int,
    command: str,
    book: Any,
) -> tune.Tuner:
    """Build a Tuner for the unfinished trials; call ``fit()`` to start it.

    Args:
        folder: a local folder for what Tune insists on writing.
        num_trials: what the searcher suggests in all.
        command: names this command's files in ``folder``.
        book: handle of the sweep's :class:`TrialBook`.
    """
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
    # Actors of a cluster that was there before have neither. How long an actor waits for a stopped
    # trial to end, Tune reads in the actor, which is then free for the next one.
    names = ("MLFLOW_", "KE_RAY_MLFLOW_", "TUNE_FUNCTION_THREAD_TIMEOUT_S")
    environment = {k: v for k, v in os.environ.items() if k.startswith(names)}
    if study.base.num_workers == 1:
        per_trial: dict[str, float] = {"cpu": resources.cpus}
        if resources.gpus:
            per_trial["gpu"] = resources.gpus
    else:
        # The actor only waits for its workers. It needs something of Ray's, or Tune refuses it,
        # and no CPU, or it would hold what they wait for: a byte of memory, which every node has.
        per_trial = {"cpu": 0, "memory": 1}
    trainable = tune.with_parameters(run_trial, book=book, environment=environment)
    return tune.Tuner(
        tune.with_resources(trainable, per_trial),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=num_trials * (study.retries + 1),  # at most; the searcher ends it
            max_concurrent_trials=resources.concurrency,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{command}",
            storage_path=folder,
            failure_config=tune.FailureConfig(max_failures=study.retries),
            verbose=0,
            callbacks=[_Abandoned(searcher)],
        ),
    )


class _Abandoned(tune.Callback):
    """Tells the searcher of trials that Tune has given up without telling it.

    Tune does so where an actor is not free for its next trial within
    ``TUNE_FUNCTION_THREAD_TIMEOUT_S``, since the one before has not come to its end.
    """

    def __init__(self, searcher: LedgerSearcher) -> None:
        self._searcher = searcher

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Ray."""
        for trial in trials:
            if trial.status == trial.ERROR:
                self._searcher.abandoned(trial.trial_id)


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


@contextmanager
def scratch_folder(output: str) -> Iterator[str]:
    """A local folder for Tune's files, removed afterwards."""
    if storage.is_local(output):
        folder = Path(storage.local_path(output)).absolute() / "ray"
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="ke_ray-sweep-"))
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
