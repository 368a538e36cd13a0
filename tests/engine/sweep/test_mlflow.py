"""Eight trials write to one MLflow store at once: SQLite, and a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_process import forkserver

from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.tracker import Tracker

pytestmark = pytest.mark.slow

NUM_WRITERS = 8
NUM_STEPS = 60


def write_trial(uri: str, number: int, parent_id: str, start: object, results: object) -> None:
    """What a trial's process does: a run of its own, curves as they come, an end."""
    from ke_ray.training.parallel import Worker
    from ke_ray.training.tracking import tracked_run

    start.wait()  # type: ignore[attr-defined]
    settings = TrackingSettings(uri=uri, experiment="eight")
    try:
        with tracked_run(
            settings,
            Worker(),
            name=f"trial{number}",
            key=f"eight {number}",
            kind="continual",
            params={"resuscitation": {"factor": number}},
            parent_id=parent_id,
        ) as run:
            for step in range(NUM_STEPS):
                run.log_metrics({"train/loss": float(number), "train/step": step}, step)
            run.log_text("acquisition,forgetting\n", "trial.csv")
            run.flush()
            lost = list(run._sender.lost) if run._sender else ["no sender"]
        results.put((number, lost, run.run_id))  # type: ignore[attr-defined]
    except BaseException as error:
        results.put((number, [repr(error)], None))  # type: ignore[attr-defined]


def check_eight_writers(uri: str) -> None:
    from mlflow.tracking import MlflowClient

    context = forkserver()  # its processes all start to write at once
    settings = TrackingSettings(uri=uri, experiment="eight")
    with Tracker(settings) as tracker:
        parent = tracker.start_run("sweep", key="sweep eight", kind="sweep")
        parent.flush()
        start, results = context.Event(), context.Queue()
        writers = [
            context.Process(target=write_trial, args=(uri, n, parent.run_id, start, results))
            for n in range(NUM_WRITERS)
        ]
        for writer in writers:
            writer.start()
        start.set()
        found = [results.get(timeout=300) for _ in writers]
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        assert [(n, lost) for n, lost, _ in found if lost] == []
        parent.finish()
    client = MlflowClient(uri)
    for number, _, run_id in found:
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
        assert run.data.params == {"resuscitation.factor": str(number)}
        history = client.get_metric_history(run_id, "train/step")
        assert sorted(metric.step for metric in history) == list(range(NUM_STEPS))
        assert {m.value for m in client.get_metric_history(run_id, "train/loss")} == {number}
        assert [file.path for file in client.list_artifacts(run_id)] == ["trial.csv"]
    experiment = client.get_experiment_by_name("eight")
    assert len(client.search_runs([experiment.experiment_id])) == NUM_WRITERS + 1


def test_eight_writers_on_sqlite(tmp_path: Path) -> None:
    check_eight_writers(f"sqlite:///{tmp_path}/mlflow.db")


def test_eight_writers_on_a_server(mlflow_server: str) -> None:
    check_eight_writers(mlflow_server)


def test_children_of_a_killed_sweep_are_closed_and_others_left_alone(tmp_path: Path) -> None:
    settings = TrackingSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with Tracker(settings) as tracker:
        parent = tracker.start_run("sweep", key="s", kind="sweep")
        child = tracker.start_run("a", key="a", kind="continual", parent_id=parent.run_id)
        done = tracker.start_run("b", key="b", kind="continual", parent_id=parent.run_id)
        done.finish("FINISHED")
        other = tracker.start_run("c", key="c", kind="continual")
        done.flush()
        assert tracker.close_children(parent.run_id) == 1
        assert tracker.find_run("a") == child.run_id
        assert tracker.find_run("nothing") is None
        found = {r: tracker.client.get_run(r.run_id).info.status for r in (child, done, other)}
        assert found == {child: "KILLED", done: "FINISHED", other: "RUNNING"}
