"""MLflow runs continue, end truthfully and survive a server that goes away."""

from __future__ import annotations

import getpass
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from ke_ray.errors import StorageError
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.sender import Outage, Sender
from ke_ray.tracking.tracker import Tracker, flatten, open_tracker


def settings(uri, **keys):
    return TrackingSettings(uri=str(uri), experiment="tests", **keys)


@pytest.fixture
def sqlite_uri(tmp_path):
    return f"sqlite:///{tmp_path}/store/mlflow.db"


def test_parameters_are_flat_and_dotted():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1]}) == {"a.b.c": 1, "e": [1]}


def test_a_run_is_found_again_by_its_key(sqlite_uri):
    with Tracker(settings(sqlite_uri)) as tracker:
        first = tracker.start_run("one", key='it\'s/a "key"', kind="scan", params={"a": {"b": 1}})
        first.log_metrics({"x": 1.0, "bad": float("nan")}, step=3)
        first.finish()
    with Tracker(settings(sqlite_uri)) as tracker:
        again = tracker.start_run("one", key='it\'s/a "key"', kind="scan", params={"a": {"b": 1}})
        other = tracker.start_run("two", key="other", kind="scan", parent_id=again.run_id)
        again.log_metrics({"x": 2.0}, step=4)
        other.finish("FAILED")
        again.finish()
        tracker.close()
        assert again.run_id == first.run_id != other.run_id
        client = tracker.client
        points = [(m.step, m.value) for m in client.get_metric_history(again.run_id, "x")]
        assert points == [(3, 1.0), (4, 2.0)]
        run = client.get_run(again.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"a.b": "1"}
        assert "bad" not in run.data.metrics
        child = client.get_run(other.run_id)
        assert child.info.status == "FAILED"
        assert child.data.tags["mlflow.parentRunId"] == again.run_id


def test_a_killed_process_leaves_no_run_that_says_running(sqlite_uri):
    code = f"""
import time
from ke_ray.tracking.sender import Sender
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.tracker import Tracker, open_tracker
tracker = Tracker(TrackingSettings(uri={sqlite_uri!r}, experiment="tests"))
run = tracker.start_run("dies", key="dies", kind="scan")
run.flush()
print(run.run_id, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Tracker(settings(sqlite_uri)) as tracker:
        assert tracker.client.get_run(run_id).info.status == "KILLED"


def test_an_experiment_is_one_of_training_and_its_runs_have_a_page_to_compare(sqlite_uri):
    with Tracker(settings(sqlite_uri)) as tracker:
        found = tracker.client.get_experiment(tracker.experiment_id)
        assert found.tags["mlflow.experimentKind"] == "custom_model_development"
        assert found.artifact_location.startswith("file:///"), "not the folder of whoever logs"
        page = tracker.compare_page(["a1", "b2"])
        path, query = page.removeprefix("#").split("?")
        given = {name: json.loads(value[0]) for name, value in list(parse_qs(query).items())[:2]}
        assert path == "/compare-runs"
        assert given == {"runs": ["a1", "b2"], "experiments": [tracker.experiment_id]}
        run = tracker.start_run("x", key="x", kind="sweep")
        run.describe(f"[compare]({page})")
        run.flush()
        tags = tracker.client.get_run(run.run_id).data.tags
        assert tags["mlflow.note.content"] == f"[compare]({page})", "cut or redacted"
        assert tags["mlflow.source.name"] == "ke-ray sweep"
        assert tags["mlflow.user"] == getpass.getuser()


def test_secrets_are_not_logged(sqlite_uri):
    secret = "hf_abcdefghijklmnop"
    with Tracker(settings(sqlite_uri, tags={"note": f"token={secret}"})) as tracker:
        run = tracker.start_run(
            "x", key="x", kind="scan", params={"source": f"https://me:{secret}@host/data"}
        )
        run.log_dataset("d", "0" * 64, f"https://host/?token={secret}", "scan")
        run.finish()
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    assert secret.encode() not in database.read_bytes()


def test_a_store_that_is_not_there_says_what_to_do(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StorageError, match="cannot be used.*MLFLOW_TRACKING_URI.*--no-mlflow"):
        Tracker(settings(f"http://127.0.0.1:{port}"))


def test_a_store_that_stays_away_is_given_up_once_not_for_each_write():
    attempts = []

    def write():
        attempts.append(time.monotonic())
        raise ConnectionError("nobody there")

    sender = Sender(give_up_after_s=0.5)
    sender.start()
    for number in range(1000):
        sender.put(f"write {number}", write)
    sender.stop()
    assert len(sender.lost) == 1000
    assert 2 <= len(attempts) < 10  # all of the first write


def test_a_store_that_comes_back_gets_what_earlier_runs_of_the_process_left(caplog):
    written = []
    is_there = False

    def write(number):
        if not is_there:
            raise ConnectionError("nobody there")
        written.append(number)

    outage = Outage("store")
    for number in (1, 2):
        sender = Sender(outage, give_up_after_s=6.0)
        sender.start()
        for part in range(3):
            sender.put("a write", lambda number=number, part=part: write((number, part)))
        sender.stop()
        assert len(sender.lost) == 3
    is_there = True
    sender = Sender(outage)
    sender.start()
    sender.put("a write", lambda: write((3, 0)))
    sender.stop()
    assert written == [*((1, part) for part in range(3)), *((2, part) for part in range(3)), (3, 0)]
    assert sender.lost == []
    messages = [record.getMessage() for record in caplog.records]
    # Each is said once, not for each run or write.
    assert len(messages) == 2, messages
    assert "does not answer (nobody there). The work goes on" in messages[0]
    assert messages[1].endswith("answers again.")


@pytest.fixture
def silent_uri():
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_work_that_has_begun_does_not_wait_for_its_store(silent_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(settings(silent_uri), deferred=True)
    tracker._sender._give_up_after_s = 2.0
    run = tracker.start_run("x", key="x", kind="continual", params={"a": 1})
    for step in range(100):
        run.log_metrics({"loss": 1.0}, step)
    run.finish()
    assert run.run_id is None
    assert tracker.find_run("x") is None
    assert tracker.close_children("parent") == 0
    assert len(tracker.close()) == 103, "tags, parameters, metrics and status"


def test_a_deferred_run_is_the_one_with_its_key(sqlite_uri):
    with Tracker(settings(sqlite_uri)) as tracker:
        first = tracker.start_run("one", key="k", kind="continual", params={"a": 1})
        first.finish("FAILED")
    with Tracker(settings(sqlite_uri), deferred=True) as tracker:
        again = tracker.start_run("one", key="k", kind="continual", params={"a": 1, "b": 2})
        again.log_metrics({"x": 1.0})
        again.finish()
        assert tracker.close() == []
        assert again.run_id == first.run_id
        found = tracker.client.get_run(first.run_id)
        assert (found.info.status, found.data.params) == ("FINISHED", {"a": "1", "b": "2"})


def test_children_whose_end_is_known_are_closed_with_it(sqlite_uri):
    with Tracker(settings(sqlite_uri)) as tracker:
        parent = tracker.start_run("s", key="s", kind="sweep")
        ok, failed, unknown = (
            tracker.start_run(name, key=name, kind="continual", parent_id=parent.run_id)
            for name in ("ok", "failed", "unknown")
        )
        unknown.flush()
        tracker.close_children(parent.run_id, {ok.run_id: "FINISHED", failed.run_id: "FAILED"})
        statuses = [tracker.client.get_run(r.run_id).info.status for r in (ok, failed, unknown)]
        assert statuses == ["FINISHED", "FAILED", "KILLED"]
        assert tracker.close_children(parent.run_id, {unknown.run_id: "FINISHED"}) == 1
        assert tracker.client.get_run(unknown.run_id).info.status == "FINISHED"


def test_a_refused_write_is_lost_alone(sqlite_uri, tmp_path):
    with Tracker(settings(sqlite_uri)) as tracker:
        run = tracker.start_run("x", key="x", kind="scan")
        run.log_artifact(tmp_path / "no such file")
        run.log_metrics({"not a valid name: *?": 1.0})
        run.log_metrics({"x": 2.0}, step=1)
        run.finish()
        assert len(tracker.close()) == 2
        found = tracker.client.get_run(run.run_id)
        assert (found.data.metrics, found.info.status) == ({"x": 2.0}, "FINISHED")


def test_switched_off_it_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_tracker(TrackingSettings(enabled=False)) as tracker:
        run = tracker.start_run("x", key="x", kind="scan")
        run.log_metrics({"a": 1.0})
        run.finish()
    assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_server_that_is_gone_for_a_while_loses_nothing(tmp_path, mlflow_gate):
    tracker = Tracker(settings(mlflow_gate.uri))
    run = tracker.start_run("survivor", key="survivor", kind="scan", params={"a": 1})
    run.log_metrics({"x": 0.0}, step=0)
    run.flush()
    mlflow_gate.close()
    for step in range(1, 6):
        started = time.monotonic()
        run.log_metrics({"x": float(step)}, step=step)
        assert time.monotonic() - started < 1, "logging waited for the server"
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    run.log_artifact(tmp_path / "table.csv")
    time.sleep(3)
    mlflow_gate.open()
    run.finish()
    assert tracker.close() == []
    history = tracker.client.get_metric_history(run.run_id, "x")
    assert [(m.step, m.value) for m in history] == [(s, float(s)) for s in range(6)]
    assert [a.path for a in tracker.client.list_artifacts(run.run_id)] == ["table.csv"]
    assert tracker.client.get_run(run.run_id).info.status == "FINISHED"


def test_points_that_may_wait_are_sent_together_and_none_is_lost(sqlite_uri):
    def logged():
        return [m.step for m in tracker.client.get_metric_history(run.run_id, "x")]

    with Tracker(settings(sqlite_uri)) as tracker:
        run = tracker.start_run("held", key="held", kind="pretrain")
        for step in range(30):
            run.log_metrics({"x": float(step)}, step=step, hold_s=600)
        tracker._sender.flush()
        assert logged() == [0], "the first is seen at once, the others wait"
        run.log_metrics({"x": 30.0}, step=30)
        tracker._sender.flush()
        assert logged() == list(range(31)), "one that may not wait takes the others along"
        run.log_metrics({"x": 31.0}, step=31, hold_s=600)
        run.finish("FAILED")
        tracker._sender.flush()
        assert logged() == list(range(32))
