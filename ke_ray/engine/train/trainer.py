"""The training loop on Ray Train (V2): workers, restarts, and what the driver sees of them.

Ray starts the workers and starts them again when one dies; everything else is the loop's own: a
new attempt finds the newest training state by itself (``ke_ray.training.checkpoint``), so the same
path serves a killed worker, a killed driver and a run without Ray. An error that another attempt
would only meet again (bad input, a loss that is not finite) is written down, ends the attempts,
and is raised on the driver as it was raised on the worker.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ke_ray import errors, storage
from ke_ray.engine.cluster.metrics import TrainingMeter
from ke_ray.engine.cluster.placement import (
    count_places,
    describe_nodes,
    describe_resources,
    may_grow,
    most_cpus,
    training_nodes,
)
from ke_ray.engine.cluster.placement_watch import watch_placement
from ke_ray.engine.cluster.session import kept_handlers, ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.engine.cluster.shared_tracking import check_nodes_reach_store
from ke_ray.errors import ConfigError, KeRayError, TrainingError
from ke_ray.evaluation.sharing import PEER_FAILED
from ke_ray.outcomes import PretrainOutcome
from ke_ray.storage.ownership import claimed
from ke_ray.studies.training import PretrainStudy, TrainingSettings
from ke_ray.tracking.tracker import check_store
from ke_ray.training.loop import Progress, StepRecord
from ke_ray.training.parallel import Worker
from ke_ray.training.pretrain import is_finished, prepare_data, run_pretrain

#: ``function(payload, worker, on_progress)``, importable on the workers.
WorkerFunction = Callable[[Any, Worker, Callable[..., None]], None]


@dataclass(frozen=True)
class WorkerResources:
    """What one worker gets."""

    cpus: int
    use_gpu: bool


def worker_resources(settings: TrainingSettings) -> WorkerResources:
    """CPUs and GPU of each worker in the cluster that is connected.

    By default each has as many CPUs as let all workers run at the same time, node by node.

    Raises:
        ConfigError: the nodes cannot hold that many workers at once and nothing adds nodes, or
            torch cannot use the GPUs that are requested.
    """
    num_workers, use_gpu = settings.num_workers, settings.use_gpu
    nodes = training_nodes(use_gpu)
    if use_gpu is None:  # too few of them are no reason to train on CPUs for weeks instead
        use_gpu = any(node.get("GPU") for node in nodes)
    gpus = int(use_gpu)
    cpus = settings.cpus_per_worker or max(1, most_cpus(nodes, num_workers, gpus))
    num_places = count_places(nodes, cpus, gpus)
    if num_places < num_workers and not may_grow():
        each = describe_resources({"CPU": cpus, "GPU": gpus})
        raise ConfigError(
            f"{num_workers} workers × ({each}) were requested, but the cluster has "
            f"{describe_nodes(nodes)} and holds {num_places} of them; lower num_workers or "
            "cpus_per_worker, set use_gpu: false, or add nodes."
        )
    return WorkerResources(cpus, use_gpu)


class ProgressFile:
    """A file in which the main worker writes its progress and its process id for the driver.

    Not through Ray's reports: those are a barrier of all workers. Local files are replaced
    without a sync to disk, at most twice a second; elsewhere every ten seconds.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._every_s = 0.5 if storage.is_local(uri) else 10.0
        self._last = 0.0

    def write(self, progress: Progress, **more: Any) -> None:
        """Write ``progress`` unless something was written a moment ago."""
        now = time.monotonic()
        if now - self._last < self._every_s and progress.record.step < progress.num_steps:
            return
        self._last = now
        text = json.dumps({**asdict(progress), "pid": os.getpid(), **more})
        if storage.is_local(self.uri):
            path = storage.local_path(self.uri)
            temporary = storage.temporary_path(path)
            temporary.write_text(text)
            temporary.replace(path)
        else:
            storage.write_atomic(self.uri, text)

    def read(self) -> dict[str, Any] | None:
        """What was written last, or None."""
        try:
            return json.loads(storage.read_bytes(self.uri))
        except (OSError, ValueError):
            return None


def _worker_main(config: dict[str, Any]) -> None:
    """Runs on every worker; ``config`` as :func:`fit` made it."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])  # relative paths of the study mean what they mean to the driver
    torch.set_num_threads(config["threads"])
    device = ray.train.torch.get_device() if config["use_gpu"] else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), str(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if storage.exists(config["fatal"]):
        return
    file = ProgressFile(config["progress"])

    def on_progress(progress: Progress, **more: Any) -> None:
        if worker.is_main:
            file.write(progress, **more)

    try:
        config["function"](config["payload"], worker, on_progress)
    except KeRayError as error:
        fatal = {"type": type(error).__name__, "message": str(error)}
        storage.write_json(config["fatal"], fatal)
        if worker.world_size > 1:
            raise  # the others may wait for it in a collective: Ray ends them all
    # Every rank reports once, so that Ray knows that the run has ended.
    ray.train.report({"finished": 1})


def build_trainer(
    function: WorkerFunction, payload: Any, settings: TrainingSettings, folder: str, name: str
) -> Any:
    """A TorchTrainer that runs ``function`` on all workers; :func:`fit` runs it.

    Args:
        function: importable on the workers; called as ``function(payload, worker, on_progress)``.
        folder: absolute URI for Ray's own files.
        name: of the run; must be new, or Ray would silently resume an old one.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = worker_resources(settings)
    per_worker: dict[str, float] = {"CPU": resources.cpus}
    if resources.use_gpu:
        per_worker["GPU"] = 1
    names = ("MLFLOW_", "KE_RAY_MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if k.startswith(names)}
    config = {
        "function": function,
        "payload": payload,
        "threads": resources.cpus,
        "use_gpu": resources.use_gpu,
        "cwd": str(Path.cwd()),
        "fatal": storage.join(folder, name, "fatal.json"),
        "progress": storage.join(folder, "progress.json"),
    }

    # In a closure and not as ``train_loop_config``: that one Ray shows (MLflow's credentials are in
    # it), and its controller reads it, for which it would import all that the workers need.
    def main() -> None:
        os.environ.update(environment)
        _worker_main(config)

    return TorchTrainer(
        main,
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
    )


def fit(
    function: WorkerFunction,
    payload: Any,
    settings: TrainingSettings,
    folder: str,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run ``function`` on Ray Train workers until it returns on all of them.

    Needs a Ray session. A worker that dies is replaced, ``settings.max_failures`` times.

    Args:
        folder: URI for Ray's own files; removed afterwards.
        on_progress: called on the driver, in a thread, with what the main worker wrote.

    Raises:
        KeRayError: as the worker raised it.
        PlacementError: no node can hold a worker any more.
        TrainingError: workers died more often than allowed; the message says of what.
    """
    folder, name = storage.absolute(folder), f"fit-{uuid.uuid4().hex[:12]}"
    storage.make_dirs(storage.join(folder, name))
    storage.remove(storage.join(folder, "progress.json"))  # of a driver that was killed
    trainer = build_trainer(function, payload, settings, folder, name)
    fatal = storage.join(folder, name, "fatal.json")
    try:
        with (
            _watched(ProgressFile(storage.join(folder, "progress.json")), on_progress),
            kept_handlers(signal.SIGINT, signal.SIGTERM),
            watch_placement(),
        ):
            trainer.fit()
    except KeRayError:  # of the watch; a worker's come as Ray's own
        raise
    except Exception as error:  # ray.train's own kinds, which are not stable across versions
        if not storage.exists(fatal):
            raise TrainingError(_explain(error, settings.max_failures)) from error
    if storage.exists(fatal):
        failure = storage.read_json(fatal)
        kind = getattr(errors, failure["type"], TrainingError)
        raise kind(failure["message"])
    storage.remove(folder)


def _explain(error: Exception, max_failures: int) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [str(cause).strip().splitlines() for cause in failures.values()]
    causes.sort(key=lambda lines: any(PEER_FAILED in line for line in lines))  # first causes first
    last = next((lines[-1] for lines in causes if lines), str(error).strip().splitlines()[-1:])
    return (
        f"Training workers failed {max_failures + 1} times (max_failures {max_failures}); the "
        f"last time: {last if isinstance(last, str) else ' '.join(last)}"
    )


@contextmanager
def _watched(
    file: ProgressFile, on_progress: Callable[[dict[str, Any]], None] | None
) -> Iterator[None]:
    if on_progress is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        shown: dict[str, Any] | None = None
        while True:
            ended = done.wait(0.5)
            state = file.read()
            if state is not None and state != shown:
                shown = state
                on_progress(state)
            if ended:
                return

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress_of(state: dict[str, Any]) -> Progress:
    """The loop's :class:`Progress` from what :class:`ProgressFile` holds."""
    return Progress(StepRecord(**state["record"]), state["num_steps"], state["time_left_s"])


def _pretrain_worker(
    study: PretrainStudy, worker: Worker, on_progress: Callable[..., None]
) -> None:
    run_pretrain(study, TrainingMeter(study, "pretrain", on_progress), worker)


def run_pretrain_on_ray(
    study: PretrainStudy, progress: Callable[[Progress], None] | None = None
) -> PretrainOutcome:
    """:func:`ke_ray.training.pretrain.run_pretrain` with ``study.num_workers`` Ray Train workers.

    Bad input is refused before Ray starts; a finished study starts nothing.

    Raises:
        UserError, TrainingError: as ``run_pretrain`` and :func:`fit`.
    """
    with claimed(study.output, "pretrain"):
        return _run_claimed(study, progress)


def _run_claimed(
    study: PretrainStudy, progress: Callable[[Progress], None] | None
) -> PretrainOutcome:
    if is_finished(study):
        return run_pretrain(study)
    prepare_data(study)
    check_store(study.mlflow)
    with ray_session():
        data = study.data
        check_nodes_see(
            [("data.source", data.source), ("data.tokenizer", data.tokenizer)], study.output
        )
        check_nodes_reach_store(study.mlflow)
        fit(
            _pretrain_worker,
            study,
            study,
            storage.join(study.output, "ray"),
            None if progress is None else lambda state: progress(progress_of(state)),
        )
    outcome = run_pretrain(study)  # finished by now: reads what it left
    return replace(outcome, num_done=1, num_skipped=0)
