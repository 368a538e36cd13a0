"""MLflow goes away in the middle of work, or was never there for one process: no run fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from servers import Gate, free_port
from tiny_studies import tiny_continual, tiny_pretrain
from tiny_sweep import tiny_sweep

from ke_ray.engine.sweep.run import run_sweep
from ke_ray.engine.train.continual import run_continual_study
from ke_ray.errors import StorageError
from ke_ray.outcomes import Display
from ke_ray.planning.sweep import prepare_sweep
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.sender import outage_of
from ke_ray.tracking.tracker import Tracker, open_tracker
from ke_ray.training.pretrain import run_pretrain

pytestmark = pytest.mark.slow

#: Longer than an outage is before it is told of.
SOON = "6"

ONLY = {"downstream": None, "held_out": None, "entropy": None, "keep_final": False}


def test_a_server_that_is_away_in_the_middle_of_a_study_misses_nothing(
    mlflow_gate: Gate, tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_RAY_MLFLOW_GIVE_UP_S", SOON)
    runs: list[str] = []

    class StopsTheServer(Display):
        def tokens(self, num_tokens: int, total: int, note: str = "") -> None:
            run = note.split(":")[0]
            if run not in runs:
                runs.append(run)
                mlflow_gate.close() if len(runs) == 1 else mlflow_gate.open()

    mlflow = {"enabled": True, "uri": mlflow_gate.uri, "experiment": "away"}
    study = tiny_continual(tmp_path / "out", pretrained, **ONLY, mlflow=mlflow)
    outcome = run_continual_study(study, StopsTheServer())
    assert len(runs) == 2, "it was away from the first run's first step to the second's"
    assert outcome.exit_code == 0
    assert [(row["status"], row["error"]) for row in outcome.rows] == [("ok", None)] * 2
    settings = TrackingSettings(uri=mlflow_gate.uri, experiment="away")
    with Tracker(settings) as tracker:
        # By name: a row names no run that was not open yet when the server went away.
        logged = tracker.client.search_runs([tracker.experiment_id])
        runs_by_name = {run.info.run_name: run for run in logged}
        assert len(logged) == 2
        for row in outcome.rows:
            run = runs_by_name[row["run"]]
            assert run.info.status == "FINISHED"
            losses = tracker.client.get_metric_history(run.info.run_id, "train/loss")
            assert sorted(m.step for m in losses) == list(range(1, row["num_steps"] + 1))
            assert run.data.metrics["result/acquisition"] == pytest.approx(row["acquisition"])


@pytest.mark.ray
def test_a_sweep_whose_server_dies_ends_well_and_the_store_tells_the_truth(
    mlflow_gate: Gate,
    tmp_path: Path,
    pretrained: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KE_RAY_MLFLOW_GIVE_UP_S", SOON)
    ended: list[str] = []

    class StopsTheServer(Display):
        def ended(self, name: str, _: Any) -> None:
            ended.append(name)
            if len(ended) == 1:
                mlflow_gate.close()

    study = tiny_sweep(
        tmp_path / "out",
        pretrained,
        base={"downstream": None},
        objectives=["acquisition"],
        mlflow={"uri": mlflow_gate.uri, "experiment": "dead"},
    )
    with open_tracker(study.mlflow) as tracker:
        outcome = run_sweep(prepare_sweep(study), tracker, StopsTheServer())
    assert outcome.exit_code == 0, outcome.failures
    assert [row["status"] for row in outcome.rows] == ["ok"] * 3
    mlflow_gate.open()
    # The same command, some seconds later, has nothing left to train; what the driver knows reaches
    # the store. (A process does not ask a store again that it has just given up.)
    while outage_of(tracker.uri).is_fresh:
        time.sleep(0.1)
    with open_tracker(study.mlflow) as tracker:
        again = run_sweep(prepare_sweep(study), tracker, StopsTheServer())
        assert (again.exit_code, again.num_skipped) == (0, 3)
        runs = tracker.client.search_runs([tracker.experiment_id])
        statuses = {run.info.run_name: run.info.status for run in runs}
        assert set(statuses.values()) == {"FINISHED"}, statuses


def test_a_trial_that_never_reaches_the_store_is_done_all_the_same(
    mlflow_server: str, tmp_path: Path, pretrained: Path
) -> None:
    alone = ["unshare", "--net"]  # a network of its own: nobody is at any address
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces need root: `unshare --net` was refused")
    mlflow = {"enabled": True, "uri": mlflow_server, "experiment": "alone"}
    study = tiny_continual(tmp_path / "out", pretrained, **ONLY, mlflow=mlflow)
    code = """
import json, sys
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.continual import run_continual
from ke_ray.training.runs import list_runs
study = ContinualStudy.model_validate(json.loads(sys.argv[1]))
row = run_continual(study, list_runs(study)[-1], parent_id="of-the-sweep")
print(json.dumps([row["status"], row["mlflow_run_id"]]))
"""
    keys = json.dumps(study.model_dump(mode="json", exclude_unset=True))
    result = subprocess.run(
        [*alone, sys.executable, "-c", code, keys],
        env=os.environ | {"KE_RAY_MLFLOW_GIVE_UP_S": SOON},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == ["ok", None]
    assert result.stderr.count("does not answer") == 1


def test_a_store_that_is_away_before_the_work_is_an_error_then(
    tmp_path: Path, pretrained: Path
) -> None:
    mlflow = {"enabled": True, "uri": f"http://127.0.0.1:{free_port()}"}
    study = tiny_continual(tmp_path / "out", pretrained, **ONLY, mlflow=mlflow)
    with pytest.raises(StorageError, match="cannot be used"):
        run_continual_study(study)
    with pytest.raises(StorageError, match="cannot be used"):
        run_pretrain(tiny_pretrain(tmp_path / "series", mlflow=mlflow))
    assert not (tmp_path / "out" / "runs").exists()
    assert not (tmp_path / "series").exists()
