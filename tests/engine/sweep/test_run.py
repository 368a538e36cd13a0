"""Sweeps on real Ray: trials, failures, retries, early stopping, what MLflow holds."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_sweep import tiny_sweep

from ke_ray.engine.sweep.run import run_sweep
from ke_ray.errors import ConfigError, ResultsError
from ke_ray.outcomes import SweepOutcome
from ke_ray.planning.sweep import prepare_sweep
from ke_ray.storage import read_json, read_table
from ke_ray.storage.ownership import claimed
from ke_ray.studies.sweep import SweepStudy
from ke_ray.tracking.tracker import open_tracker
from ke_ray.training.continual import run_continual

pytestmark = pytest.mark.ray


@pytest.fixture
def series(pretrained: Path) -> Path:
    return pretrained


def sweep(study: SweepStudy) -> SweepOutcome:
    plan = prepare_sweep(study)
    with open_tracker(study.mlflow) as tracker:
        return run_sweep(plan, tracker)


def mlflow_runs(uri: str) -> dict[str, Any]:
    """Every run of the store by its name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, max_results=200)
    names = [run.info.run_name for run in found]
    assert len(set(names)) == len(names), names
    return {run.info.run_name: run for run in found}


def test_trials_are_the_runs_of_the_continual_study(
    tmp_path: Path, series: Path, ray_cluster: None
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={"entropy": {"measures": ["loss"]}},
        objectives=["acquisition", "forgetting", "loss"],
        mlflow={"uri": uri, "tags": {"by": "test"}},
    )
    outcome = sweep(study)
    assert outcome.exit_code == 0, outcome.failures
    assert [row["status"] for row in outcome.rows] == ["ok"] * 3
    # The same numbers as without Ray, in this process.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for trial, row in zip(prepare_sweep(study).trials, outcome.rows, strict=True):
            keys = {"output": str(tmp_path / "alone"), "mlflow": {"enabled": False}}
            alone = type(trial.study).model_validate({**trial.study.model_dump(), **keys})
            expected = run_continual(alone, trial.spec)
            for name in ("acquisition", "forgetting", "knowledge_entropy_after_nats"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5), name
            loss = json.loads(expected["measured"])["loss"]
            assert json.loads(row["measured"])["loss"] == pytest.approx(loss, rel=1e-5)
    finally:
        torch.set_num_threads(threads)

    table = read_table(tmp_path / "sweep" / "trials.parquet").to_pandas()
    assert table["resuscitation.factor"].isna().tolist() == [True, False, False]
    assert table["amplifying_factor"].tolist()[1:] == [0.5, 2.0]
    assert read_json(tmp_path / "sweep" / "manifest.json")["status"] == "finished"
    assert not (tmp_path / "sweep" / "ray").exists()

    runs = mlflow_runs(uri)
    parent = runs.pop("sweep")
    assert (parent.info.status, parent.data.tags["ke_ray.kind"]) == ("FINISHED", "sweep")
    assert parent.data.metrics["trials/ok"] == 3
    assert set(runs) == {row["trial_id"] for row in outcome.rows}
    for row in outcome.rows:
        child = runs[row["trial_id"]]
        assert child.info.run_id == row["mlflow_run_id"]
        assert child.info.status == "FINISHED"
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["by"] == "test"
        metrics = child.data.metrics
        assert metrics["objective/acquisition"] == pytest.approx(row["acquisition"])
        assert metrics["objective/loss"] == json.loads(row["measured"])["loss"]
        assert metrics["objective/forgetting"] == pytest.approx(row["forgetting"])
        assert metrics["result/forgetting_vs_original"] is not None
        change = row["knowledge_entropy_after_nats"] - row["knowledge_entropy_before_nats"]
        assert metrics["result/knowledge_entropy_change_nats"] == pytest.approx(change)
        assert child.data.params["optimizer.learning_rate"] == "0.005"
        factor = row["params"]["resuscitation.factor"]
        assert child.data.params["resuscitation.factor"] == (
            "none" if factor is None else str(float(factor))
        )
        assert child.data.params["resuscitation.ratio"] == ("none" if factor is None else "0.5")
        assert "resuscitation.coefficients" not in child.data.params, "a tag: it hides what differs"

    # All is done: nothing runs, nothing is written anew.
    files = sorted((tmp_path / "sweep" / "runs").rglob("run.json"))
    before = [path.stat().st_mtime_ns for path in files]
    again = sweep(study)
    assert (again.num_skipped, again.exit_code) == (3, 0)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert set(mlflow_runs(uri)) == {"sweep", *runs}


def test_a_failing_trial_is_retried_then_a_row_and_the_others_finish(
    tmp_path: Path, series: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={"optimizer": {"max_grad_norm": None}, "schedule": {"warmup_steps": 0}},
        space={"optimizer.learning_rate": [1e18, 2e-3]},
        points=[],
        retries=1,
        max_concurrent=1,  # one actor for both
        mlflow={"uri": uri},
    )
    outcome = sweep(study)
    assert [row["status"] for row in outcome.rows] == ["failed", "ok"]
    assert outcome.exit_code == 1
    ((name, error),) = outcome.failures
    assert "1e18" in name
    assert "The loss is nan" in error
    assert f"Trial {name} took 2 attempts." in caplog.messages
    runs = mlflow_runs(uri)
    assert runs[name].info.status == "FAILED"
    assert outcome.rows[0]["mlflow_run_id"] == runs[name].info.run_id
    assert runs[name].data.tags["ke_ray.trial"] == name
    assert runs["sweep"].info.status == "FAILED"
    manifest = read_json(tmp_path / "sweep" / "manifest.json")
    assert (manifest["status"], manifest["num_failed"]) == ("failed", 1)
    # The next command tries the failed trial again, and only that one.
    again = sweep(study)
    assert again.num_skipped == 1
    assert mlflow_runs(uri).keys() == runs.keys(), "the retried trial continues its run"


def own_trial_processes() -> list[psutil.Process]:
    """Actors of trials among this process' descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("run_trial" in part or "ImplicitFunc" in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_trial_when(ready: Callable[[], bool], killed: list[int]) -> threading.Thread:
    """SIGKILL the trials' actors as soon as ``ready``."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if ready():
                for process in own_trial_processes():
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_killed_trial_goes_on_and_continues_its_mlflow_run(
    tmp_path: Path, series: Path, ray_cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={"epochs": 12, "save_every": 4, "injection": None},
        space=None,
        objectives=["forgetting"],
        mlflow={"uri": uri},
    )
    name = prepare_sweep(study).trials[0].trial_id
    state = tmp_path / "sweep" / "runs" / name / "state"
    killed: list[int] = []
    watcher = kill_trial_when(lambda: state.is_dir() and any(state.iterdir()), killed)
    outcome = sweep(study)
    watcher.join()
    assert killed, "the trial was over before it could be killed"
    assert [row["status"] for row in outcome.rows] == ["ok"]
    assert f"Trial {name} took 2 attempts." in caplog.messages
    train = read_table(state.parent / "train.parquet").to_pandas()
    assert train["step"].tolist() == list(range(1, 73)), "every step once"
    runs = mlflow_runs(uri)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(runs) == 2


def test_asha_stops_the_worse_half_early(tmp_path: Path, series: Path, ray_cluster: None) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={"probes": {"every": 2, "around_injections": False}, "resuscitation": None},
        space={"optimizer.learning_rate": [1e-2, 1e-7, 2e-7, 3e-7]},
        points=[],
        objectives=["acquisition"],
        scheduler={"name": "asha", "grace": 0.3},
        max_concurrent=1,
        mlflow={"uri": uri},
    )
    outcome = sweep(study)
    assert outcome.exit_code == 0, outcome.failures
    by_rate = {row["params"]["optimizer.learning_rate"]: row for row in outcome.rows}
    assert by_rate[1e-2]["status"] == "ok"
    stopped = [row for row in outcome.rows if row["status"] == "stopped"]
    assert stopped
    runs = mlflow_runs(uri)
    for row in stopped:
        assert row["stopped_at_step"] in (2, 4)
        assert row["acquisition_at_stop"] < by_rate[1e-2]["acquisition"]
        run = runs[row["trial_id"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["ke_ray.stopped_early"] == "asha"
    assert sweep(study).num_skipped == 4


def test_a_trial_that_got_no_actor_is_run_all_the_same(
    tmp_path: Path, series: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune gives a trial up whose actor was not free in time, and says nothing of it."""
    monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "0")  # a stopped trial takes longer
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={"probes": {"every": 2, "around_injections": False}, "resuscitation": None},
        space={"optimizer.learning_rate": [1e-2, 1e-7, 2e-7]},
        points=[],
        objectives=["acquisition"],
        scheduler={"name": "asha", "grace": 0.3},
        max_concurrent=1,
    )
    outcome = sweep(study)
    assert outcome.exit_code == 0, outcome.failures
    assert len(outcome.rows) == 3
    assert sweep(study).num_skipped == 3


def test_tpe_with_two_objectives(tmp_path: Path, series: Path, ray_cluster: None) -> None:
    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        space={"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
        search="tpe",
        points=[],
        num_trials=3,
        startup_trials=2,
        max_concurrent=1,
    )
    outcome = sweep(study)
    assert outcome.exit_code == 0, outcome.failures
    rates = [row["params"]["optimizer.learning_rate"] for row in outcome.rows]
    assert len(set(rates)) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert len(read_json(tmp_path / "sweep" / "points.json")) == 3


def test_asking_for_more_than_there_is_ends_at_once(
    tmp_path: Path, series: Path, ray_cluster: None
) -> None:
    for changes in ({"cpus_per_trial": 3}, {"base": {"num_workers": 8}}):
        study = tiny_sweep(tmp_path / "sweep", series, **changes)
        with pytest.raises(ConfigError, match="more than the cluster's nodes have"):
            sweep(study)
        assert not (tmp_path / "sweep" / "manifest.json").exists()


def test_a_second_command_in_the_same_folder_is_refused(tmp_path: Path, series: Path) -> None:
    study = tiny_sweep(tmp_path / "sweep", series)
    with claimed(study.output, "sweep"), pytest.raises(ResultsError, match="is writing"):
        Context().run(sweep, study)  # as another command: a context of its own


@pytest.mark.slow
def test_two_workers_give_the_weights_of_one(
    tmp_path: Path, series: Path, ray_cluster: None
) -> None:
    from safetensors.torch import load_file

    study = tiny_sweep(
        tmp_path / "sweep",
        series,
        base={
            **{"num_workers": 2, "keep_final": True, "micro_batch_size": 4},
            "probes": {"every": 2},
        },
        space={"resuscitation.factor": [2]},
        points=[],
        objectives=["acquisition"],
    )
    (trial,) = prepare_sweep(study).trials
    keys = {"num_workers": 1, "output": str(tmp_path / "alone"), "mlflow": {"enabled": False}}
    alone = type(trial.study).model_validate({**trial.study.model_dump(), **keys})
    expected = run_continual(alone, trial.spec)
    outcome = sweep(study)
    assert outcome.exit_code == 0, outcome.failures
    (row,) = outcome.rows
    assert row["acquisition"] == pytest.approx(expected["acquisition"], rel=1e-3)
    one, two = (
        load_file(next((tmp_path / name).rglob("final/model.safetensors")))
        for name in ("alone", "sweep")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=2e-4, atol=2e-6)
