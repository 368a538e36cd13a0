"""A continual-learning study on Ray Train: runs one after another, each with all workers.

One ``fit`` serves all runs: starting Ray Train takes longer than a small run. The workers go
through the pending runs; a run that fails becomes a row and the next one follows. What a worker
cannot survive (killed, out of memory) is Ray Train's to retry, and after ``max_failures`` of those
the run it happened in becomes the failed row. Every run writes its own part, so a killed command
redoes no finished run, and an unfinished one goes on from its last training state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ke_ray import storage
from ke_ray.engine.cluster.metrics import TrainingMeter
from ke_ray.engine.cluster.session import ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.engine.cluster.shared_tracking import check_nodes_reach_store
from ke_ray.engine.train.trainer import fit, progress_of
from ke_ray.errors import KeRayError, PlacementError
from ke_ray.results.columns import RUN_TABLES, names, to_table
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.storage.ownership import claimed
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.identity import check_same_study, identity_fields
from ke_ray.tracking.tracker import check_store
from ke_ray.training.continual import run_continual
from ke_ray.training.loop import Progress
from ke_ray.training.parallel import Worker
from ke_ray.training.runs import (
    RunSpec,
    list_runs,
    part_folder,
    read_row,
    study_keys,
    write_failed,
)

__all__ = [
    "ContinualOutcome",
    "RunProgress",
    "collect",
    "prepare_continual",
    "read_by_workers",
    "run_continual_study",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunProgress:
    """What a live display shows: the loop's progress and where it stands in the study."""

    progress: Progress
    run: str
    number: int
    num_runs: int
    next_injection: int | None


@dataclass
class ContinualOutcome:
    """What came of a study.

    Attributes:
        rows: one per run, as in ``runs.parquet``.
        skipped: runs found finished.
        phases_s: seconds of checking the input, of Ray's and the workers' start, of the work.
    """

    output: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(run, error) of the runs that failed."""
        return [(r["run"], r["error"]) for r in self.rows if r["status"] != "ok"]

    @property
    def exit_code(self) -> int:
        """1 where a run failed."""
        return 1 if self.failures else 0


def prepare_continual(study: ContinualStudy) -> list[RunSpec]:
    """List the runs and find out, before anything is trained, what is wrong with the request.

    Starts that lie on this machine are looked at one by one; others when they are fetched.

    Raises:
        UserError: the selection names nothing, a tokenizer is missing, the corpus is too small, a
            schedule does not fit, the output folder holds another study, …
    """
    with claimed(study.output, "continual"):
        return _prepare_claimed(study)


def _prepare_claimed(study: ContinualStudy) -> list[RunSpec]:
    from ke_ray.training.inputs import load_inputs, read_start

    specs = list_runs(study)
    _check_output(study)
    checked: set[tuple[str, int, int]] = set()
    for spec in specs:
        if not spec.ref.is_local:
            continue
        start = read_start(study, spec.ref, spec.ref.location)
        # What follows depends on the tokens alone: once for each tokenizer and seed.
        key = (start.tokenizer.to_str(), start.eos_token_id, spec.seed)
        if key not in checked:
            checked.add(key)
            load_inputs(study, start, spec.seed)
    if study.downstream is not None:
        from ke_ray.evaluation.downstream import load_tasks

        keys = study.downstream
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # remarks on every task it loads
        load_tasks(keys.tasks, data_dir=keys.data, own_tasks=keys.own_tasks)
    return specs


def _check_output(study: ContinualStudy) -> None:
    if not storage.exists(storage.join(study.output, "manifest.json")):
        storage.check_writable(study.output)
        return
    manifest = read_manifest(study.output, "continual")
    check_same_study(study.output, manifest, study_keys(study))


def run_continual_study(
    study: ContinualStudy, progress: Callable[[RunProgress], None] | None = None
) -> ContinualOutcome:
    """Run what is missing of a study and write its tables.

    Args:
        progress: called on the driver about twice a second.

    Raises:
        UserError: bad input, or another command is writing the output folder; nothing was trained.
    """
    with claimed(study.output, "continual"):
        return _run_claimed(study, progress)


def _run_claimed(
    study: ContinualStudy, progress: Callable[[RunProgress], None] | None
) -> ContinualOutcome:
    started = time.perf_counter()
    outcome = ContinualOutcome(study.output)
    specs = _listed(study)
    pending = [spec for spec in specs if not _is_done(study, spec)]
    if pending:
        specs = prepare_continual(study)
        check_store(study.mlflow)
    outcome.skipped = len(specs) - len(pending)
    outcome.phases_s["check"] = time.perf_counter() - started
    manifest = new_manifest("continual", study.model_dump(mode="json"))
    manifest |= identity_fields(study_keys(study)) | {"runs": [spec.name for spec in specs]}
    if pending:
        write_manifest(study.output, manifest)
        if study.executor == "inline":
            for number, spec in enumerate(pending):
                _run_inline(study, spec, _Board(specs, progress, outcome.skipped + number))
        else:
            _run_on_ray(study, specs, pending, progress, outcome)
    collected = time.perf_counter()
    outcome.rows = collect(study, specs)
    manifest |= {
        "status": "finished" if not outcome.failures else "failed",
        "num_failed": len(outcome.failures),
        "phases_s": outcome.phases_s,
    }
    if pending or read_manifest(study.output, "continual").get("runs") != manifest["runs"]:
        write_manifest(study.output, manifest)
    outcome.phases_s["collect"] = time.perf_counter() - collected
    return outcome


def _listed(study: ContinualStudy) -> list[RunSpec]:
    specs = list_runs(study)
    _check_output(study)
    return specs


def _is_done(study: ContinualStudy, spec: RunSpec) -> bool:
    row = read_row(study, spec)
    return row is not None and row["status"] == "ok"


class _Board:
    """Turns what the workers leave into :class:`RunProgress` for the caller."""

    def __init__(
        self,
        specs: Sequence[RunSpec],
        progress: Callable[[RunProgress], None] | None,
        num_done: int,
    ) -> None:
        self.names = [spec.name for spec in specs]
        self.progress, self.num_done = progress, num_done
        self.started_at: float | None = None
        self.seen: list[str] = []

    def show(self, progress: Progress, run: str, next_injection: int | None) -> None:
        """Pass on one state of one run."""
        self.started_at = self.started_at or time.perf_counter()
        if run not in self.seen:
            self.seen.append(run)
        if self.progress is not None:
            number = self.num_done + len(self.seen)
            self.progress(RunProgress(progress, run, number, len(self.names), next_injection))

    def show_file(self, found: dict[str, Any]) -> None:
        """The same from a progress file."""
        self.show(progress_of(found), found.get("run", ""), found.get("next_injection"))


def _run_inline(study: ContinualStudy, spec: RunSpec, board: _Board) -> None:
    try:
        run_continual(study, spec, Worker(), board.show)
    except Exception as error:
        log.debug("run %s failed", spec.name, exc_info=True)
        write_failed(study, spec, _told(error))


def _told(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, KeRayError) else f"{type(error).__name__}: {text}"[:2000]


def _current(study: ContinualStudy) -> str:
    return storage.join(study.output, "ray", "current.json")


def _continual_worker(
    payload: dict[str, Any], worker: Worker, on_progress: Callable[..., None]
) -> None:
    """All pending runs, one after another, on one of the workers."""
    study: ContinualStudy = payload["study"]
    for spec in payload["specs"]:
        row = read_row(study, spec)
        if row is not None and (row["status"] == "ok" or row.get("fit") == payload["fit"]):
            continue  # finished, or failed, by an earlier attempt
        if worker.is_main:
            storage.write_json(_current(study), {"run": spec.name})
        meter = TrainingMeter(study, spec.name, on_progress)
        try:
            run_continual(study, spec, worker, meter, on_probes=meter.probes)
        except Exception as error:
            if worker.world_size > 1:
                raise  # the others may wait in a collective: Ray ends them, the driver goes on
            log.debug("run %s failed", spec.name, exc_info=True)
            write_failed(study, spec, _told(error), fit=payload["fit"])


def read_by_workers(
    study: ContinualStudy, specs: Sequence[RunSpec]
) -> list[tuple[str, str | None]]:
    """What the workers of these runs read: (what it is, path or URI)."""
    found: list[tuple[str, str | None]] = [
        ("The checkpoint", spec.ref.location) for spec in specs if spec.ref.is_local
    ]
    for group in ("corpus", "injection", "downstream", "held_out", "entropy", "resuscitation"):
        keys = getattr(study, group)
        for name in ("source", "paraphrase", "once", "schedule", "data", "coefficients"):
            found.append((f"{group}.{name}", getattr(keys, name, None)))
    own_tasks = study.downstream.own_tasks if study.downstream else {}
    found += [(f"downstream.own_tasks.{name}", place) for name, place in own_tasks.items()]
    return [*found, ("tokenizer", study.tokenizer)]


def _run_on_ray(
    study: ContinualStudy,
    specs: Sequence[RunSpec],
    pending: Sequence[RunSpec],
    progress: Callable[[RunProgress], None] | None,
    outcome: ContinualOutcome,
) -> None:
    started = time.perf_counter()
    board = _Board(specs, progress, outcome.skipped)
    left = list(pending)
    with ray_session():
        outcome.phases_s["ray_start"] = time.perf_counter() - started
        check_nodes_see(read_by_workers(study, pending), study.output)
        check_nodes_reach_store(study.mlflow)
        while left:
            fit_id = f"{time.time_ns():x}"
            payload = {"study": study, "specs": left, "fit": fit_id}
            folder = storage.join(study.output, "ray")
            storage.remove(_current(study))
            try:
                fit(_continual_worker, payload, study, folder, board.show_file)
                break
            except PlacementError:
                raise
            except KeRayError as error:
                if not storage.exists(_current(study)):
                    raise  # the cluster cannot hold the workers, …: no run is to blame
                left = _after_failure(study, left, fit_id, _told(error))
    work_started = board.started_at or time.perf_counter()
    outcome.phases_s["worker_start"] = work_started - started - outcome.phases_s["ray_start"]
    outcome.phases_s["work"] = time.perf_counter() - work_started


def _after_failure(
    study: ContinualStudy, left: Sequence[RunSpec], fit_id: str, error: str
) -> list[RunSpec]:
    """Write down the run in which the workers failed; the runs that are still to be done."""
    current = storage.read_json(_current(study))["run"]
    rest = []
    for spec in left:
        row = read_row(study, spec)
        if row is not None and (row["status"] == "ok" or row.get("fit") == fit_id):
            continue
        if spec.name == current:
            write_failed(study, spec, error, fit=fit_id)
        else:
            rest.append(spec)
    return rest


def collect(study: ContinualStudy, specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
    """Join the parts of all runs into the study's tables.

    Returns:
        The rows of ``runs.parquet``, in the order of ``specs``.
    """
    import pyarrow as pa

    rows = [row for spec in specs if (row := read_row(study, spec)) is not None]
    known = [{k: v for k, v in row.items() if k in names("runs")} for row in rows]
    storage.write_table(storage.join(study.output, "runs.parquet"), to_table("runs", known))
    ok = {row["run"] for row in rows if row["status"] == "ok"}
    for name in RUN_TABLES:
        if name == "runs":
            continue
        parts = []
        for spec in specs:
            path = storage.join(part_folder(study, spec), f"{name}.parquet")
            if spec.name in ok and storage.exists(path):
                parts.append(storage.read_table(path))
        if parts:
            storage.write_table(
                storage.join(study.output, f"{name}.parquet"), pa.concat_tables(parts)
            )
    return known
