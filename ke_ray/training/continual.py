"""One continual-learning run: a start trained on a corpus with injected facts, and evaluated.

load → [resuscitate] → snapshot → train with injections, probes at chosen steps → snapshot. No Ray:
``ke_ray.engine.train.continual`` runs it on Ray Train, sweep trials in their own actors.

A run keeps everything in ``<output>/runs/<run>/``: ``before.json`` (the start's snapshots, for a
resumed run), ``state/`` while it trains, its part of each table, ``final/`` (the trained model)
and, last of all, ``run.json``, which makes it finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ke_ray import storage
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.data.injection import injection_records
from ke_ray.data.tokenizer import save_tokenizer
from ke_ray.evaluation.forward import autocast
from ke_ray.evaluation.sharing import Workers
from ke_ray.models.loading import load_model, require_head
from ke_ray.results.training_folder import write_tables
from ke_ray.resuscitation.apply import resuscitate
from ke_ray.resuscitation.coefficients import coefficients_of
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.checkpoint import TrainingState, remove_states
from ke_ray.training.dynamics import dynamics_tables
from ke_ray.training.export import export_model
from ke_ray.training.inputs import RunInputs, load_inputs, read_start
from ke_ray.training.loop import Hooks, Progress, train
from ke_ray.training.parallel import Worker, barrier, main_says
from ke_ray.training.result import result_columns, result_metrics
from ke_ray.training.runs import (
    RunSpec,
    base_row,
    part_folder,
    read_row,
    run_identity,
    run_key,
    write_row,
)
from ke_ray.training.snapshot import Snapshot, coefficient_sums, take_snapshot
from ke_ray.training.tracking import log_progress, run_params, tracked_run

ProgressCallback = Callable[..., None]


@dataclass(frozen=True)
class _Before:
    """Snapshots of the start, which outlive a killed attempt in ``before.json``.

    Attributes:
        start: of the model that is trained.
        original: of the start before its resuscitation; None where it was not resuscitated.
        predicted_entropy_nats: of the resuscitated start, the sum over layers.
        notes: tags about the coefficients.
    """

    start: Snapshot
    original: Snapshot | None = None
    predicted_entropy_nats: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> _Before:
        snapshots = {
            name: Snapshot.from_json(values[name]) if values[name] else None
            for name in ("start", "original")
        }
        return cls(
            **snapshots,  # type: ignore[arg-type]
            predicted_entropy_nats=values["predicted_entropy_nats"],
            notes=values["notes"],
        )


def run_continual(
    study: ContinualStudy,
    spec: RunSpec,
    worker: Worker | None = None,
    on_progress: ProgressCallback | None = None,
    parent_id: str | None = None,
    on_probes: Callable[[int, Snapshot], None] | None = None,
) -> dict[str, Any]:
    """Start or resume one run, unless it is finished; call it on every worker.

    Args:
        on_progress: ``(progress, run=…, next_injection=…)`` on the main worker.
        parent_id: id of the parent MLflow run.
        on_probes: ``(step, snapshot)`` on the main worker whenever the facts were probed.

    Returns:
        The row of ``runs.parquet``.

    Raises:
        KeRayError: bad input, a broken checkpoint, a loss that is not finite.
    """
    worker = worker or Worker()
    row = read_row(study, spec)
    barrier(worker)
    if row is not None and row["status"] == "ok":
        return row
    with Store(storage.join(study.cache_dir, "checkpoints") if study.cache_dir else None) as store:
        folder = store.fetch(spec.ref)
        start = read_start(study, spec.ref, folder)
        if worker.is_main:
            load_inputs(study, start, spec.seed)  # packs the corpus once, for all workers
        barrier(worker)
        inputs = load_inputs(study, start, spec.seed)
        with tracked_run(
            study.mlflow,
            worker,
            name=spec.name,
            key=run_key(study, spec, parent_id),
            kind="continual",
            params=run_params(study, spec),
            tags={
                "checkpoint": spec.ref.label,
                "data_sha256": inputs.rows.sha256,
                "ke_ray.output": study.output,
            },
            parent_id=parent_id,
        ) as run:
            corpus = study.corpus
            run.log_dataset(corpus.name, inputs.rows.sha256, corpus.source, "training")
            return _Run(study, spec, inputs, worker, run, on_progress, on_probes).go(folder)


class _Run:
    """State of one run between its start and its row."""

    def __init__(
        self,
        study: ContinualStudy,
        spec: RunSpec,
        inputs: RunInputs,
        worker: Worker,
        run: Any,
        on_progress: ProgressCallback | None,
        on_probes: Callable[[int, Snapshot], None] | None,
    ) -> None:
        self.study, self.spec, self.inputs = study, spec, inputs
        self.worker, self.run = worker, run
        self.workers = Workers(worker.rank, worker.world_size)
        self.on_progress, self.on_probes = on_progress, on_probes
        self.folder = part_folder(study, spec)
        self.states = storage.join(self.folder, "state")
        self.identity = run_identity(study, spec)

    def go(self, checkpoint: str) -> dict[str, Any]:
        """Train and evaluate the model in the folder ``checkpoint``."""
        started = time.perf_counter()
        model, before = self._start(checkpoint)
        log = log_progress(self.run, self.inputs.num_steps)

        def show(progress: Progress) -> None:
            log(progress)
            if self.on_progress is not None:
                plan = self.inputs.plan
                upcoming = plan.next_injection(progress.record.step) if plan else None
                self.on_progress(progress, run=self.spec.name, next_injection=upcoming)

        # Without facts there is nothing to probe on the way.
        steps = self.inputs.probe_steps if self.inputs.questions.probes else ()
        state = train(
            model,
            self.inputs.rows,
            self.study,
            num_steps=self.inputs.num_steps,
            worker=self.worker,
            hooks=Hooks(
                transform=self._inject if self.inputs.plan else None,
                after_step=self._probe,
                at_steps=frozenset(steps) - {0},
                on_progress=show,
            ),
            state_uri=self.states,
            identity=self.identity,
        )
        final = storage.join(self.folder, "final") if self.study.keep_final else None
        if final is not None:
            export_model(model, final, self.worker, self._tokenizer_folder())
        after = self._snapshot(model)
        row: dict[str, Any] = {}
        if before is not None:
            self._log_snapshot(after, self.inputs.num_steps, "after")
            self.run.flush()  # where the store answers, this waits for the run's id
            row = self._row(before, after, state, final, time.perf_counter() - started)
            self._write(before, after, state, row)
        barrier(self.worker)
        return row

    def _start(self, checkpoint: str) -> tuple[Any, _Before | None]:
        """Load the start, resuscitate it where the study says so, and evaluate it.

        Returns:
            the model and, on the main worker, its snapshots.
        """
        model = load_model(checkpoint, device=self.worker.device)
        require_head(model, "Continual training")
        before = self._read_before() if self.worker.is_main else None
        is_measured = main_says(before is not None, self.worker)
        original, record = None, None
        if (settings := self.study.resuscitation) is not None:
            if not is_measured:
                original = self._snapshot(model)
            coefficients = coefficients_of(
                settings,
                lambda: weights_sha256(checkpoint),
                self.spec.ref.name,
                lambda: self._measured_coefficients(model),
            )
            record = resuscitate(model, settings, coefficients)
        start = None if is_measured else self._snapshot(model)
        if self.worker.is_main:
            if start is not None:
                before = _Before(start, original)
                if record is not None and record.coefficients is not None:
                    before = _Before(
                        start,
                        original,
                        sum(record.predicted_entropy_nats),
                        {
                            "coefficients": record.coefficients,
                            "coefficients_verified": str(record.coefficients_verified),
                        },
                    )
                values = {"identity": self.identity, **asdict(before)}
                storage.write_json(self._before_path, values)
            assert before is not None
            self._log_snapshot(before.start, 0, "before")
            if self.on_probes is not None and before.start.probe_rows:
                self.on_probes(0, before.start)
        barrier(self.worker)
        return model, before

    def _measured_coefficients(self, model: Any) -> Any:
        """C̄ of the start on the study's own entropy text."""
        assert self.study.entropy is not None
        assert self.inputs.questions.entropy is not None
        corpus, size = self.inputs.questions.entropy, self.study.entropy.batch_size
        with autocast(model, self.study.evaluation_dtype):
            sums = coefficient_sums(model, corpus, size, self.workers)
        return sums.mean("coefficients")

    def _snapshot(self, model: Any, *, probes_only: bool = False) -> Snapshot:
        """Evaluate the model on all workers together."""
        return take_snapshot(
            model, self.study, self.inputs.questions, probes_only=probes_only, workers=self.workers
        )

    @property
    def _before_path(self) -> str:
        return storage.join(self.folder, "before.json")

    def _read_before(self) -> _Before | None:
        """The snapshots that an earlier attempt at this very run took of its start."""
        if not storage.exists(self._before_path):
            return None
        values = storage.read_json(self._before_path)
        return _Before.from_json(values) if values.get("identity") == self.identity else None

    def _inject(self, step: int, first_row: int, rows: Any) -> Any:
        assert self.inputs.plan is not None
        return self.inputs.plan.inject(rows, step, range(first_row, first_row + len(rows)))

    def _probe(self, step: int, model: nn.Module, state: TrainingState) -> None:
        snapshot = self._snapshot(model, probes_only=True)
        if self.worker.is_main:
            record_probes(state, step, snapshot)
            self._log_snapshot(snapshot, step, None)
            if self.on_probes is not None:
                self.on_probes(step, snapshot)
        barrier(self.worker)

    def _tokenizer_folder(self) -> str | None:
        """A folder with the start's tokenizer, which lm-eval and others need beside the weights."""
        folder = storage.join(self.folder, "tokenizer")
        if self.worker.is_main:
            start = self.inputs.start
            save_tokenizer(start.tokenizer, folder, eos_token_id=start.eos_token_id)
        barrier(self.worker)
        return folder

    def _log_snapshot(self, snapshot: Snapshot, step: int, when: str | None) -> None:
        metrics: dict[str, Any] = {"probes/knowledge_nats_per_token": snapshot.knowledge}
        for row in snapshot.probe_rows:
            metrics[f"probes/{row['setting']}/{row['level']}"] = row["logprob_per_token"]
        if when is not None:
            metrics["downstream/accuracy"] = snapshot.accuracy
            for task in snapshot.downstream:
                metrics[f"downstream/{task['task']}"] = task["value"]
            metrics["knowledge_entropy/total_nats"] = snapshot.entropy_nats
            metrics |= {f"measures/{name}": value for name, value in snapshot.totals.items()}
            if snapshot.perplexity:
                metrics["held_out/perplexity"] = snapshot.perplexity["perplexity"]
        self.run.log_metrics({k: v for k, v in metrics.items() if v is not None}, step)

    def _row(
        self,
        before: _Before,
        after: Snapshot,
        state: TrainingState,
        final: str | None,
        duration_s: float,
    ) -> dict[str, Any]:
        row = {
            **base_row(self.study, self.spec),
            "status": "ok",
            "error": None,
            **result_columns(before.start, after, before.original),
            "measured": json.dumps(after.totals) if after.measures else None,
            "num_steps": self.inputs.num_steps,
            "num_tokens": state.num_tokens,
            "duration_s": duration_s,
            "final_checkpoint": final,
            "mlflow_run_id": self.run.run_id,
        }
        if before.original is not None:
            row["knowledge_entropy_predicted_nats"] = before.predicted_entropy_nats
        self.run.log_metrics(result_metrics(row), self.inputs.num_steps)
        if before.notes:
            self.run.set_tags(before.notes)
        return row

    def _write(
        self, before: _Before, after: Snapshot, state: TrainingState, row: dict[str, Any]
    ) -> None:
        at_start = TrainingState()
        record_probes(at_start, 0, before.start)
        records: dict[str, list[dict[str, Any]]] = {
            name: [*at_start.records.get(name, []), *state.records.get(name, [])]
            for name in ("train", "probes", "probe_items")
        }
        plan = self.inputs.plan
        if plan is not None:
            steps = plan.injection_steps()
            records["injections"] = [r for step in steps for r in injection_records(plan, step)]
            records |= dynamics_tables(records["probe_items"], records["injections"])
        snapshots = {"before": before.start, "after": after}
        if before.original is not None:
            snapshots = {"original": before.original, **snapshots}
        records["downstream"] = [
            {"when": when, **{k: v for k, v in task.items() if k != "items"}}
            for when, snapshot in snapshots.items()
            for task in snapshot.downstream
        ]
        records["perplexity"] = [
            {"when": when, **snapshot.perplexity}
            for when, snapshot in snapshots.items()
            if snapshot.perplexity
        ]
        records["measures"] = [
            {"when": when, **row}
            for when, snapshot in snapshots.items()
            for row in snapshot.measures
        ]
        write_tables(self.folder, records, self.spec.name)
        # The row ends the run for good, so MLflow gets its status first: a command that is killed
        # between the two does both again, but after the row no command would correct the status.
        self.run.finish("FINISHED")
        self.run.flush()
        write_row(self.study, self.spec, row)
        if not self.study.keep_state:
            remove_states(self.states)


def record_probes(state: TrainingState, step: int, snapshot: Snapshot) -> None:
    """Add a snapshot's probes to the records of a training state."""
    for row in snapshot.probe_rows:
        state.record("probes", {"step": step, **row})
    for item in snapshot.probe_items:
        state.record("probe_items", {"step": step, **item})
