"""A sweep on Ray Tune: trials side by side, each a continual-learning run.

Tune schedules: it starts actors within the resources, uses them again, starts trials again whose
process died, and (with ASHA) stops trials. It keeps nothing: the ledger does
(``ke_ray.planning.sweep``), so that the same command after any kind of end resumes with what is
missing, on another cluster too. Each trial writes its own MLflow run, a child of the sweep's.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ke_ray import storage
from ke_ray.engine.cluster.metrics import record
from ke_ray.engine.cluster.placement import may_grow
from ke_ray.engine.cluster.placement_watch import watch_placement
from ke_ray.engine.cluster.session import beside_driver, ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.engine.cluster.shared_tracking import check_nodes_reach_store
from ke_ray.engine.sweep.resources import TrialResources, sweep_nodes, trial_resources
from ke_ray.engine.sweep.trial import STOPPED_TAG, TIME, VALUE, config_of_trial
from ke_ray.engine.train.continual import read_by_workers
from ke_ray.outcomes import Display, SweepOutcome
from ke_ray.planning.sweep import SweepPlan
from ke_ray.planning.trial_book import TrialBook
from ke_ray.planning.trials import Trial
from ke_ray.results.columns import OBJECTIVES
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.results.sweep_folder import (
    objective_value,
    settings_rows,
    settings_table,
    trials_table,
)
from ke_ray.storage.ownership import claimed
from ke_ray.studies.identity import identity_fields, identity_keys
from ke_ray.studies.parts import study_label
from ke_ray.tracking.run import TrackedRun
from ke_ray.tracking.tracker import Tracker, flatten
from ke_ray.training.runs import base_row, run_key, write_failed, write_row
from ke_ray.training.tracking import run_params

log = logging.getLogger(__name__)

#: Read by Tune on the driver and in its actors.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no csv, json and TensorBoard files of each trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is an exception here, as SIGTERM is
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # Tune's own state is not used
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a stopped trial closes its MLflow run
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report has no metric
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_sweep(plan: SweepPlan, tracker: Tracker, display: Display | None = None) -> SweepOutcome:
    """Run the trials of a sweep that are missing, and write its tables.

    Args:
        plan: from ``prepare_sweep``.
        tracker: open; its store gets the sweep's run and the trials' runs.

    Raises:
        UserError: the cluster cannot hold a trial; another command runs this sweep.
        KeyboardInterrupt: after statuses and tables were made truthful.
    """
    study, display = plan.study, display or Display()
    missing = [trial for trial in plan.trials if not trial.is_done]
    outcome = SweepOutcome(study.output, num_skipped=len(plan.trials) - len(missing))
    pending = plan.num_trials - outcome.num_skipped
    run = _Run(plan, tracker, display)
    with claimed(study.output, "sweep"), ExitStack() as session:
        if pending:
            started = time.perf_counter()
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            session.enter_context(ray_session())
            inputs = [source for t in missing for source in read_by_workers(t.study, [t.spec])]
            check_nodes_see(inputs, study.output)
            check_nodes_reach_store(study.mlflow)
            run.resources = trial_resources(study, sweep_nodes(study), pending, may_grow=may_grow())
            outcome.phases_s["ray_start"] = time.perf_counter() - started
        parent = run.parent = tracker.start_run(
            study_label(study),
            key=f"sweep {run.folder_id}",
            kind="sweep",
            params=study.model_dump(mode="json", by_alias=True, exclude={"mlflow"}),
        )
        outcome.mlflow_run_id, status = parent.run_id, "FAILED"
        try:
            if pending:
                tracker.close_children(parent.run_id)  # of a command that was killed
                run.go(pending, outcome)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            session.close()  # no trial runs from here on
            run.settle_unnamed()
            tracker.close_children(parent.run_id, run.ends())
            unfinished = {"KILLED": "interrupted", "FAILED": "failed"}
            collect_sweep(plan, outcome, unfinished.get(status))
            display.stop()
            status = "FAILED" if status == "FINISHED" and outcome.exit_code else status
            _log_parent(parent, outcome)
            parent.finish(status)
            parent.flush()
    return outcome


def _folder_id(output: str) -> str | None:
    """The id in the folder's manifest; None where no sweep has started there."""
    if not storage.exists(storage.join(output, "manifest.json")):
        return None
    return str(read_manifest(output, "sweep").get("id", storage.absolute(output)))


class _Run:
    """State of one command: what its trials get, and how each ended."""

    def __init__(self, plan: SweepPlan, tracker: Tracker, display: Display) -> None:
        self.plan, self.tracker, self.display = plan, tracker, display
        self.parent = tracker.run(None)
        self.unnamed: list[Trial] = []  # trials whose rows do not name their MLflow runs
        # A folder that is removed and made again is another sweep.
        self.folder_id = _folder_id(plan.study.output) or uuid.uuid4().hex
        self.command = uuid.uuid4().hex[:12]
        self.settings: dict[str, Any] = {}
        self.resources: TrialResources | None = None
        self.book: Any = None

    def go(self, pending: int, outcome: SweepOutcome) -> None:
        """Run the trials that are missing."""
        study, resources = self.plan.study, self.resources
        assert resources is not None
        record("ke_ray_sweep_trials_planned", pending, study=study_label(study))
        self._write_start()
        self.display.start(
            num_items=pending,
            num_skipped=outcome.num_skipped,
            note=f"{resources.concurrency} at a time",
        )
        self.settings = {
            "cwd": os.getcwd(),
            "threads": resources.cpus,
            "command": self.command,
            "parent_id": self.parent.run_id,
            "watch": study.scheduler is not None,
        }
        # Tune reads its environment when it is imported.
        import ray

        from ke_ray.engine.sweep.search import LedgerSearcher
        from ke_ray.engine.sweep.tuner import build_tuner, scratch_folder

        self.book = ray.remote(TrialBook).options(**beside_driver()).remote(study.retries + 1)
        started, started_at = time.perf_counter(), time.time()
        searcher = LedgerSearcher(self.plan, self.config, self.settle)
        with scratch_folder(study.output) as folder, watch_placement():
            build_tuner(study, searcher, resources, folder, pending, self.command, self.book).fit()
        took_s = time.perf_counter() - started
        first_at, attempts = ray.get(self.book.summary.remote())
        for name, number in attempts.items():
            if number > 1:
                log.warning("Trial %s took %d attempts.", name, number)
        waited_s = min(max(0.0, (first_at or started_at) - started_at), took_s)
        outcome.phases_s |= {"worker_start": waited_s, "trials": took_s - waited_s}

    def _write_start(self) -> None:
        """Write the manifest, which says whose folder this is, and the points so far."""
        study, path = self.plan.study, self.plan.study.output
        storage.check_writable(path)
        manifest = new_manifest("sweep", study.model_dump(mode="json", by_alias=True))
        if storage.exists(storage.join(path, "manifest.json")):
            manifest["created_at"] = read_manifest(path, "sweep")["created_at"]
        manifest |= {
            "id": self.folder_id,
            **identity_fields(identity_keys(study)),
            "files": self.plan.files,
            "parameters": list(study.shown_keys),
            "search": study.search,
            "objectives": [objective.model_dump() for objective in study.objectives],
            "num_trials": self.plan.num_trials,
        }
        write_manifest(path, manifest)
        self.plan.save_points()

    def config(self, trial: Trial) -> dict[str, Any]:
        """What Tune gets of a trial: the name under which its actor finds the rest."""
        import ray

        config = config_of_trial(trial, self.settings)
        config["study"]["mlflow"] = self._mlflow()
        resources = self.resources
        if trial.study.num_workers > 1 and resources is not None:
            # Else each trial would take all of the cluster's CPUs for its workers.
            config["study"]["cpus_per_worker"] = resources.cpus
            config["study"]["use_gpu"] = bool(resources.gpus)
        ray.get(self.book.put.remote(trial.trial_id, config))
        return {"trial": trial.trial_id}

    def _mlflow(self) -> dict[str, Any]:
        settings = self.plan.study.mlflow
        if not self.tracker.enabled:
            return {"enabled": False}
        from_environment = settings.uri is None and "MLFLOW_TRACKING_URI" in os.environ
        return {
            **settings.model_dump(mode="json"),
            "uri": None if from_environment else self.tracker.uri,
            "experiment": self.tracker.experiment,
        }

    def settle(self, trial: Trial, result: Mapping[str, Any], error: bool) -> None:
        """A trial has ended: complete its row, and log what the sweep adds to its run."""
        row = trial.row()
        stale = row is not None and row["status"] == "failed" and row.get("fit") != self.command
        if row is None or stale:
            if error:
                text = f"The trial's process died {self.plan.study.retries + 1} times."
                write_failed(trial.study, trial.spec, text, fit=self.command)
            else:
                _write_stopped(trial, result)
            row = trial.row()
        assert row is not None
        if row.get("mlflow_run_id") is None:
            self.unnamed.append(trial)  # looked up at the end: Tune waits here
        self._log_child(trial, row)
        record("ke_ray_sweep_trials", 1, study=study_label(self.plan.study), status=row["status"])
        self.display.ended(trial.trial_id, [row])
        trials = sweep_rows(self.plan)
        table = trials_table(trials, self.plan.study.shown_keys)
        storage.write_table(storage.join(self.plan.study.output, "trials.parquet"), table)

    def settle_unnamed(self) -> None:
        """Look up the MLflow runs of trials that did not live to write them down, and end them.

        A scheduler may end a trial's actor before its run says FINISHED, and a store may have been
        away when the trial ended, also that of an earlier command.
        """
        before = [trial for trial in self.plan.trials if trial not in self.unnamed]
        rows = [(trial, trial.row()) for trial in (*self.unnamed, *before)]
        for trial, row in rows:
            if row is None or row.get("mlflow_run_id") is not None:
                continue
            run_id = self.tracker.find_run(run_key(trial.study, trial.spec, self.parent.run_id))
            if run_id is None:
                continue
            row = {**row, "mlflow_run_id": run_id}
            write_row(trial.study, trial.spec, row)
            self._log_child(trial, row)
            if row["status"] == "stopped":
                self.tracker.run(run_id).set_tags({STOPPED_TAG: "asha"})
                self.tracker.run(run_id).finish("FINISHED")
        self.parent.flush()

    def ends(self) -> dict[str, str]:
        """How the MLflow runs of this sweep's trials ended, by id."""
        return {
            row["mlflow_run_id"]: "FAILED" if row["status"] == "failed" else "FINISHED"
            for row in sweep_rows(self.plan)
            if row.get("mlflow_run_id")
        }

    def _log_child(self, trial: Trial, row: Mapping[str, Any]) -> None:
        run_id = row.get("mlflow_run_id")
        if run_id is None:
            return
        named = {f"objective/{o.metric}": o.metric for o in self.plan.study.objectives}
        named |= {f"result/{metric}": metric for metric in OBJECTIVES}
        values = {name: objective_value(row, metric) for name, metric in named.items()}
        run = self.tracker.run(run_id)
        # A group that is off has no keys, and MLflow would draw its trial beside the largest value.
        own = flatten(run_params(trial.study, trial.spec))
        usual = flatten(run_params(self.plan.study.base, trial.spec))
        run.log_params(dict.fromkeys({*usual, *trial.params} - set(own), "none"))
        run.log_metrics(
            {k: v for k, v in values.items() if v is not None}, row.get("num_steps") or 0
        )
        run.set_tags({"ke_ray.trial": trial.trial_id, "ke_ray.point": str(trial.point.number)})


def _write_stopped(trial: Trial, result: Mapping[str, Any]) -> None:
    step, share = result.get("step"), result.get(TIME)
    moment = "before its first probes" if share is None else f"after {share:.0f} % of its steps"
    row = {
        **base_row(trial.study, trial.spec),
        "status": "stopped",
        "error": f"Stopped by the scheduler {moment}.",
        "stopped_at_step": step,
        "acquisition_at_stop": result.get(VALUE),
    }
    write_row(trial.study, trial.spec, row)


def sweep_rows(plan: SweepPlan) -> list[dict[str, Any]]:
    """The rows of all trials that have ended, by point and seed."""
    rows = []
    for trial in plan.trials:
        row = trial.row()
        if row is not None:
            own = {"trial_id": trial.trial_id, "point": trial.point.number, "params": trial.params}
            rows.append({**row, **own})
    return rows


def collect_sweep(plan: SweepPlan, outcome: SweepOutcome, status: str | None = None) -> None:
    """Write ``trials.parquet``, ``settings.parquet`` and the manifest; fill in the outcome."""
    study = plan.study
    if not storage.exists(storage.join(study.output, "manifest.json")):
        return  # refused before it started
    outcome.set_rows(sweep_rows(plan))
    objectives = [(o.metric, str(o.direction)) for o in study.objectives]
    settings = settings_rows(outcome.rows, objectives)
    table = trials_table(outcome.rows, study.shown_keys)
    storage.write_table(storage.join(study.output, "trials.parquet"), table)
    storage.write_table(storage.join(study.output, "settings.parquet"), settings_table(settings))
    ok = [row for row in outcome.rows if row["status"] == "ok"]
    outcome.missing = [
        metric
        for metric, _ in objectives
        if ok and all(objective_value(row, metric) is None for row in ok)
    ]
    manifest = read_manifest(study.output, "sweep")
    manifest |= {
        "status": status or ("failed" if outcome.exit_code else "finished"),
        "num_failed": len(outcome.failures),
        "num_trials": plan.num_trials,
        "phases_s": outcome.phases_s,
    }
    write_manifest(study.output, manifest)


def _log_parent(parent: TrackedRun, outcome: SweepOutcome) -> None:
    counts = {
        f"trials/{status}": float(sum(row["status"] == status for row in outcome.rows))
        for status in ("ok", "failed", "stopped")
    }
    parent.log_metrics(counts)
