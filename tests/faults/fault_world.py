"""A tiny world for ``faults.py``: workloads of a few seconds, their results, and what must hold.

Three workloads, whose results on an undisturbed machine are known: a scan of eight random
checkpoints, a pretraining on one Ray Train worker, a sweep of three trials.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load as load_safetensors

from ke_ray import storage
from ke_ray.config import validate
from ke_ray.storage.ownership import MARK
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import SweepStudy
from ke_ray.studies.training import PretrainStudy

NUM_CHECKPOINTS = 8
#: Titles of the processes that do ke_ray's work in a Ray session.
WORKERS = ("MapWorker", "ScanMonitor", "RayTrainWorker", "TrainController", "ImplicitFunc")

Results = dict[Any, Any]


class World:
    """Checkpoints, data and the MLflow database of all injections, under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.series = folder / "series"
        self.ids = folder / "ids.npy"
        self.trained = folder / "trained"
        self.mlflow_uri = f"sqlite:///{folder}/mlflow.db"
        self.expected: dict[str, Results] = {}

    def build(self, workloads: set[str]) -> None:
        """Make what the workloads read, and run each once, undisturbed."""
        self.build_inputs(workloads)
        for workload in sorted(workloads - set(self.expected)):
            study = self.study(workload, self.folder / f"undisturbed-{workload}", None)
            run(study)  # in a folder of an earlier call it is finished already
            self.expected[workload] = results_of(workload, Path(study.output))

    def build_inputs(self, workloads: set[str]) -> None:
        """Make what the workloads read."""
        if not self.ids.exists():
            for number in range(NUM_CHECKPOINTS):
                make_checkpoint(self.series / f"step{10 * (number + 1)}", number)
            ids = np.random.default_rng(0).integers(2, 128, (64, 24)).astype(np.uint16)
            np.save(self.ids, ids)
        if workloads & {"continual", "sweep"} and not self.trained.exists():
            from ke_ray.training.pretrain import run_pretrain

            run_pretrain(self.pretrain(self.trained, None, num_steps=10))

    def study(self, workload: str, output: Path, experiment: str | None, **keys: Any) -> Any:
        """A study of a workload; ``experiment`` None: not logged to MLflow."""
        make: Callable[..., Any] = getattr(self, workload)
        return make(output, experiment, **keys)

    def scan(self, output: Path, experiment: str | None, **keys: Any) -> ScanStudy:
        """Eight checkpoints, 64 instances of 24 tokens, two scorers."""
        values = {
            "kind": "scan",
            "checkpoints": {"spec": str(self.series)},
            "data": {"ids": str(self.ids)},
            "num_instances": 64,
            "sequence_length": 24,
            "batch_size": 1,
            "num_actors": 2,
            "measures": ["knowledge_entropy", "attention_entropy", "gini"],
            "output": str(output),
            "mlflow": self._mlflow(experiment),
        }
        return validate(ScanStudy, values | keys, "scan")

    def pretrain(self, output: Path, experiment: str | None, **keys: Any) -> PretrainStudy:
        """Two layers of width 16, 60 steps, a training state after each fifth."""
        values = {
            "kind": "pretrain",
            "model": {"n_layers": 2, "d_model": 16, "d_mlp": 32, "n_heads": 2},
            "data": {
                "biographies": {
                    **{"num_people": 6, "documents_per_person": 12, "num_new_people": 4},
                    **{"num_other_people": 8, "num_questions": 12},
                },
                "vocab_size": 400,
            },
            "sequence_length": 48,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "cpus_per_worker": 1,
            "num_steps": 60,
            "save_every": 5,
            "max_failures": 5,
            "optimizer": {"learning_rate": 0.01},
            "checkpoints": {"number": 2, "spacing": "linear"},
            "output": str(output),
            "mlflow": self._mlflow(experiment),
        }
        values["model"]["max_positions"] = 320
        return validate(PretrainStudy, values | keys, "pretrain")

    def sweep(self, output: Path, experiment: str | None, **keys: Any) -> SweepStudy:
        """The last checkpoint continued for 24 steps as it is and with two amplifying factors."""
        values = {
            "kind": "sweep",
            "base": self._continual(output),
            "space": {"resuscitation.factor": [0.5, 2]},
            "points": [{"resuscitation": None}],
            "objectives": ["forgetting"],
            "retries": 5,
            "output": str(output),
            "mlflow": self._mlflow(experiment),
        }
        return validate(SweepStudy, values | keys, "sweep")

    def continual(self, output: Path, experiment: str | None, **keys: Any) -> ContinualStudy:
        """Two checkpoints continued for 24 steps, each by two training workers."""
        values = self._continual(output) | {"num_workers": 2, "mlflow": self._mlflow(experiment)}
        values["starts"] = {"spec": str(self.trained / "checkpoints"), "steps": "5:10"}
        del values["resuscitation"]
        return validate(ContinualStudy, values | keys, "continual")

    def _continual(self, output: Path) -> dict[str, Any]:
        world = self.trained / "world"
        return {
            "kind": "continual",
            "starts": {"spec": str(self.trained / "checkpoints"), "steps": "10:10"},
            "corpus": {
                "name": "others",
                "source": str(world / "other_documents.jsonl.gz"),
                "num_instances": 48,
            },
            "sequence_length": 128,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "epochs": 4,
            "save_every": 3,
            "optimizer": {"learning_rate": 0.005},
            "resuscitation": {"ratio": 0.5, "factor": 1.0},
            "downstream": {
                "tasks": [],
                "own_tasks": {"biographies": str(world / "questions.jsonl")},
                "limit": 6,
            },
            "entropy": {"source": str(world / "documents.jsonl.gz"), "num_instances": 4},
            "held_out": {"source": str(world / "documents.jsonl.gz"), "num_instances": 4},
            "keep_final": False,
            "executor": "ray",
            "output": str(output),
        }

    def _mlflow(self, experiment: str | None) -> dict[str, Any]:
        if experiment is None:
            return {"enabled": False}
        return {"uri": self.mlflow_uri, "experiment": experiment}


def make_checkpoint(folder: Path, seed: int) -> None:
    """A random two-layer OLMo in Hugging Face layout."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    OlmoForCausalLM(config).eval().save_pretrained(folder)


def run(study: Any) -> Any:
    """Run a study in the Ray session of this process."""
    from ke_ray.tracking.tracker import open_tracker

    if study.kind == "pretrain":
        from ke_ray.engine.train.trainer import run_pretrain_on_ray

        return run_pretrain_on_ray(study)
    with open_tracker(study.mlflow) as tracker:
        if study.kind == "sweep":
            from ke_ray.engine.sweep.run import run_sweep
            from ke_ray.planning.sweep import prepare_sweep

            return run_sweep(prepare_sweep(study), tracker)
        from ke_ray.engine.scan.run import run_scan
        from ke_ray.outcomes import Display
        from ke_ray.planning.scan import prepare_scan

        return run_scan(prepare_scan(study), Display(), tracker)


def results_of(workload: str, output: Path) -> Results:
    """Every number of a result, by a key that names it; a key there twice is an error."""
    rows: list[tuple[Any, Any]] = []
    if workload == "scan":
        from ke_ray.results import ScanFolder

        folder = ScanFolder.open(str(output))
        table = storage.read_table(output / "entropy.parquet").to_pylist()
        names = ("checkpoint", "corpus", "layer", "measure")
        rows += [(tuple(row[n] for n in names), row["value"]) for row in table]
        for name in sorted({row["checkpoint"] for row in table if row["status"] == "ok"}):
            rows.append((("coefficients", name), folder.mean_coefficients(name)))
    elif workload == "pretrain":
        table = storage.read_table(output / "train.parquet").to_pylist()
        rows += [(("loss", row["step"]), row["loss"]) for row in table]
        for path in sorted(output.glob("checkpoints/*/model.safetensors")):
            tensors = load_safetensors(path.read_bytes())
            rows += [((path.parent.name, name), tensor) for name, tensor in tensors.items()]
    else:
        columns = ("status", "forgetting", "downstream_after", "perplexity_after")
        columns += ("knowledge_entropy_before_nats", "knowledge_entropy_after_nats")
        file, key = ("trials", "trial_id") if workload == "sweep" else ("runs", "run")
        for row in storage.read_table(output / f"{file}.parquet").to_pylist():
            rows += [((row[key], name), row[name]) for name in columns]
            losses = storage.read_table(output / "runs" / row[key] / "train.parquet")
            rows += [((row[key], r["step"]), r["loss"]) for r in losses.to_pylist()]
    found = dict(rows)
    if len(found) < len(rows):
        raise ValueError(f"{len(rows) - len(found)} results are there twice")
    return found


def difference(found: Results, expected: Results) -> float:
    """The largest difference of two results, relative to the largest value of its array.

    Raises:
        ValueError: one has what the other has not.
    """
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if missing or extra:
        raise ValueError(
            f"missing {sorted(map(str, missing))[:3]}, extra {sorted(map(str, extra))[:3]}"
        )
    worst = 0.0
    for key, value in expected.items():
        if value is None or isinstance(value, str):
            if found[key] != value:
                raise ValueError(f"{key} is {found[key]!r}, not {value!r}")
            continue
        ours, theirs = np.asarray(found[key], float), np.asarray(value, float)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            raise ValueError(f"{key} has another shape, or is not finite")
        scale = max(float(np.max(np.abs(theirs), initial=0.0)), 1e-30)
        worst = max(worst, float(np.max(np.abs(ours - theirs), initial=0.0)) / scale)
    return worst


def leftovers(output: Path) -> list[str]:
    """Names below a finished result folder that only a run under way has."""
    return [
        str(path.relative_to(output))
        for path in sorted(output.rglob("*"))
        if (path.name.startswith(".") and path.name != MARK)
        or path.name.endswith((".incomplete", ".tmp", ".part"))
        or path.name in ("parts", "ray", "state")
    ]


def mlflow_problems(uri: str, experiment: str, workload: str) -> list[str]:
    """What is untrue in MLflow of a workload that has ended well."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    runs = client.search_runs([known.experiment_id], max_results=100) if known else []
    names = sorted(run.info.run_name for run in runs)
    wanted = {"scan": 1, "continual": 2, "pretrain": 1, "sweep": 4}[workload]
    problems = [
        f"{run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED"
    ]
    if len(runs) != wanted or len(set(names)) != wanted:
        problems.append(f"{len(runs)} runs in place of {wanted}: {names}")
    for run in runs if workload == "scan" else ():
        history = client.get_metric_history(run.info.run_id, "knowledge_entropy/total_nats")
        steps = sorted(metric.step for metric in history)
        if steps != [10 * (n + 1) for n in range(NUM_CHECKPOINTS)]:
            problems.append(f"knowledge entropy is logged at steps {steps}")
    return problems


def processes(root: int | None = None, titles: tuple[str, ...] = WORKERS) -> list[psutil.Process]:
    """Descendants of a process whose titles hold one of ``titles``."""
    found = []
    try:
        children = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        title = _title(child)
        if title is not None and any(word in title for word in titles):
            found.append(child)
    return found


def _title(process: psutil.Process) -> str | None:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return None


def session_problems(timeout_s: float = 60.0) -> list[str]:
    """Actors' processes and placement groups that outlive their work, after a moment's patience."""
    import ray
    from ray.util import placement_group_table

    deadline = time.monotonic() + timeout_s
    while True:
        gc.collect()  # an actor goes with the last handle, and handles stand in cycles
        problems = [f"process {p.pid} ({_title(p)}) is left" for p in processes()]
        if ray.is_initialized():
            groups = placement_group_table().values()
            problems += [
                f"a placement group is {g['state']}" for g in groups if g["state"] != "REMOVED"
            ]
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(0.2)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
