"""A continual-learning study on Ray Train: runs one after another, each with all workers.

One ``fit`` serves all runs: starting Ray Train takes longer than a small run. The workers go
through the pending runs; a run that fails becomes a row and the next one follows. What a worker
cannot survive (killed, out of memory) is Ray Train's to retry, and after ``max_failures`` of those
the run it happened in becomes the failed row. Every run writes its own part, so a killed command
redoes no finished run, and an unfinished one resumes from its last training state.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from ke_ray import storage
from ke_ray.engine.cluster.metrics import TrainingMeter
from ke_ray.engine.cluster.session import ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.engine.cluster.shared_tracking import check_nodes_reach_store
from ke_ray.engine.train.trainer import fit, progress_of
from ke_ray.errors import KeRayError, PlacementError, row_error
from ke_ray.evaluation.downstream import load_tasks
from ke_ray.outcomes import Display, Outcome
from ke_ray.results.columns import RUN_TABLES, names, to_table
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.storage.ownership import claimed
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.identity import check_same_study, identity_fields
from ke_ray.tracking.tracker import check_store
from ke_ray.training.continual import run_continual
from ke_ray.training.inputs import load_inputs, read_start
from ke_ray.training.loop import Progress
from ke_ray.training.parallel import Worker, lone_worker
from ke_ray.training.runs import (
    RunSpec,
    list_runs,
    part_folder,
    read_row,
    study_keys,
    write_failed,
)

log = logging.getLogger(__name__)


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
    specs = _listed(study)
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
        settings = study.downstream
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # remarks on every task it loads
        load_tasks(settings.tasks, data_dir=settings.data, own_tasks=settings.own_tasks)
    return specs


def _check_output(study: ContinualStudy) -> None:
    if not storage.exists(storage.join(study.output, "manifest.json")):
        storage.check_writable(study.output)
        return
    manifest = read_manifest(study.output, "continual")
    check_same_study(study.output, manifest, study_keys(study))


def run_continual_study(study: ContinualStudy, display: Display | None = None) -> Outcome:
    """Run what is missing of a study and write its tables.

    Raises:
        UserError: bad input, or another command is writing the output folder; nothing was trained.
    """
    with claimed(study.output, "continual"):
        return _run_claimed(study, display or Display())


def _run_claimed(study: ContinualStudy, display: Display) -> Outcome:
    started = time.perf_counter()
    outcome = Outcome(study.output)
    specs = _listed(study)
    pending = [spec for spec in specs if not _is_done(study, spec)]
    worker = Worker()
    if pending:
        if study.executor == "inline":
            worker = lone_worker(study.use_gpu)
        specs = prepare_continual(study)
        check_store(study.mlflow)
    outcome.num_skipped = len(specs) - len(pending)
    outcome.phases_s["check"] = time.perf_counter() - started
    manifest = new_manifest("continual", study.model_dump(mode="json"))
    manifest |= identity_fields(study_keys(study)) | {"runs": [spec.name for spec in specs]}
    display.start(num_items=len(pending), num_skipped=outcome.num_skipped)
    if pending:
        write_manifest(study.output, manifest)
        reporter = _RunReporter(study, pending, display)
        if study.executor == "inline":
            for spec in pending:
                _run_inline(study, spec, worker, reporter)
        else:
            _run_on_ray(study, pending, reporter, outcome)
        reporter.finish()
    collected = time.perf_counter()
    outcome.set_rows(collect(study, specs))
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


class _RunReporter:
    """Passes what the workers write to the display, run by run.

    Args:
        pending: the runs to do, in order.
    """

    def __init__(self, study: ContinualStudy, pending: Sequence[RunSpec], display: Display) -> None:
        self._study, self._display = study, display
        self._remaining, self._num_runs = deque(pending), len(pending)
        self.started_at: float | None = None

    def show(self, progress: Progress, run: str, next_injection: int | None) -> None:
        """Show how far a run is; all before it have ended."""
        self.started_at = self.started_at or time.perf_counter()
        if any(spec.name == run for spec in self._remaining):
            while self._remaining[0].name != run:
                self._end_first()
        record = progress.record
        per_run = record.num_tokens // record.step * progress.num_steps  # in all runs of a study
        note = f"{run}: {progress}"
        if next_injection is not None:
            note += f", next injection at {next_injection}"
        num_ended = self._num_runs - len(self._remaining)
        total = self._num_runs * per_run
        self._display.tokens(num_ended * per_run + record.num_tokens, total, note)

    def show_file(self, state: dict[str, Any]) -> None:
        """The same from a progress file."""
        self.show(progress_of(state), state.get("run", ""), state.get("next_injection"))

    def finish(self) -> None:
        """All runs have ended."""
        while self._remaining:
            self._end_first()

    def _end_first(self) -> None:
        spec = self._remaining.popleft()
        if row := read_row(self._study, spec):
            self._display.ended(spec.name, [row])


def _run_inline(
    study: ContinualStudy, spec: RunSpec, worker: Worker, reporter: _RunReporter
) -> None:
    try:
        run_continual(study, spec, worker, reporter.show)
    except Exception as error:
        log.debug("run %s failed", spec.name, exc_info=True)
        write_failed(study, spec, row_error(error))


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
                raise  # the others may wait in a collective: Ray ends them, the driver continues
            log.debug("run %s failed", spec.name, exc_info=True)
            write_failed(study, spec, row_error(error), fit=payload["fit"])


def read_by_workers(
    study: ContinualStudy, specs: Sequence[RunSpec]
) -> list[tuple[str, str | None]]:
    """What the workers of these runs read: (what it is, path or URI)."""
    inputs: list[tuple[str, str | None]] = [
        ("The checkpoint", spec.ref.location) for spec in specs if spec.ref.format != "hub"
    ]
    for group in ("corpus", "injection", "downstream", "held_out", "entropy", "resuscitation"):
        settings = getattr(study, group)
        for name in ("source", "paraphrase", "once", "schedule", "data", "coefficients"):
            inputs.append((f"{group}.{name}", getattr(settings, name, None)))
    own_tasks = study.downstream.own_tasks if study.downstream else {}
    inputs += [(f"downstream.own_tasks.{name}", path) for name, path in own_tasks.items()]
    return [*inputs, ("tokenizer", study.tokenizer)]


def _run_on_ray(
    study: ContinualStudy, pending: Sequence[RunSpec], reporter: _RunReporter, outcome: Outcome
) -> None:
    started = time.perf_counter()
    remaining = list(pending)
    with ray_session():
        outcome.phases_s["ray_start"] = time.perf_counter() - started
        check_nodes_see(read_by_workers(study, pending), study.output)
        check_nodes_reach_store(study.mlflow)
        while remaining:
            fit_id = f"{time.time_ns():x}"
            payload = {"study": study, "specs": remaining, "fit": fit_id}
            folder = storage.join(study.output, "ray")
            storage.remove(_current(study))
            try:
                fit(_continual_worker, payload, study, folder, reporter.show_file)
                break
            except PlacementError:
                raise
            except KeRayError as error:
                if not storage.exists(_current(study)):
                    raise  # the cluster cannot hold the workers, …: no run is to blame
                remaining = _after_failure(study, remaining, fit_id, row_error(error))
    work_started = reporter.started_at or time.perf_counter()
    outcome.phases_s["worker_start"] = work_started - started - outcome.phases_s["ray_start"]
    outcome.phases_s["work"] = time.perf_counter() - work_started


def _after_failure(
    study: ContinualStudy, remaining: Sequence[RunSpec], fit_id: str, error: str
) -> list[RunSpec]:
    """Write down the run in which the workers failed; the runs that are still to be done."""
    current = storage.read_json(_current(study))["run"]
    rest = []
    for spec in remaining:
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
    rows = [row for spec in specs if (row := read_row(study, spec)) is not None]
    columns = names("runs")
    rows = [{k: v for k, v in row.items() if k in columns} for row in rows]
    storage.write_table(storage.join(study.output, "runs.parquet"), to_table("runs", rows))
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
    return rows
