"""``ke-ray sweep``: dry runs without a network, bad input, interrupts and kills of the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_studies import tiny_pretrain
from tiny_sweep import tiny_sweep

from ke_ray.storage import read_json, read_table
from ke_ray.training.pretrain import run_pretrain

SWEEPS = Path(__file__).parents[2] / "sweeps"
SHIPPED = ["demo", "resuscitation_q", "resuscitation_p", "resuscitation_stage", "table1", "pareto"]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    run_pretrain(tiny_pretrain(folder))
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_sweep_has_a_plan_without_a_network(ke_ray, monkeypatch, tmp_path, name):
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a dry run wants the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    result = ke_ray("sweep", SWEEPS / f"{name}.yaml", "--dry-run")
    assert result.code == 0, result.err
    lines = {line.split(":")[0]: line for line in result.out.splitlines()}
    assert int(lines["trials"].split()[1]) >= 4
    assert "about" in lines["training tokens"]
    assert ("H100" in lines["hours"]) == (name != "demo")
    assert ("assumed" in lines["hours"]) == ("measured in" in lines["hours"]) == (name != "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_local_start_tells_the_models_size(ke_ray, series, tmp_path):
    result = ke_ray("sweep", write(tmp_path, series), "--dry-run")
    assert result.code == 0, result.err
    assert "trials: 3 (3 points, 1 seeds)" in result.out
    assert "by the checkpoint's config" in result.out
    assert not (tmp_path / "out").exists()


def write(folder: Path, series: Path, **changes: Any) -> Path:
    """The tiny sweep as a file."""
    mlflow = {"uri": f"sqlite:///{folder}/mlflow.db"}
    study = tiny_sweep(folder / "out", series, **{"mlflow": mlflow, **changes})
    values = study.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["space={resuscitate.factor: [1]}"], "Did you mean 'resuscitation.factor'?"),
        (["space={resuscitation.ratio: [0]}"], "'resuscitation.ratio'"),
        (["space={resuscitation.ratio: [1.2]}"], "less than or equal to 1"),
        (["space={resuscitation.factor: [0]}"], "greater than 0"),
        (["objectives=[perplexity_after]"], "no trial would report the objective"),
        (["search=tpe", "num_trials=2", "space={resuscitation: [{}]}"], "Optuna takes"),
        (["base.resuscitation.coefficients=nowhere"], "'nowhere', which is not there"),
        (["base.starts.steps='99:'"], "99"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(
    ke_ray, series, tmp_path, overrides, expected
):
    path = write(tmp_path, series)
    arguments = [part for override in overrides for part in ("--set", override)]
    result = ke_ray("sweep", path, *arguments)
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1
    assert expected in result.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture
def command() -> Iterator[Callable[[Path, Path], subprocess.Popen[bytes]]]:
    """Starts ``ke-ray sweep`` as a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path, log: Path) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        process = subprocess.Popen(
            [sys.executable, "-m", "ke_ray", "sweep", str(path)],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def statuses(folder: Path) -> dict[str, str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {r.info.run_name: r.info.status for r in client.search_runs(experiments)}


def wait_for(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_file_goes_on_after_the_driver_ended(command, series, tmp_path):
    path = write(
        tmp_path,
        series,
        base={"save_every": 4, "injection": None},
        objectives=["forgetting"],
        space={"epochs": [1, 24, 2]},
        points=[],
        max_concurrent=1,
    )
    log = tmp_path / "log.txt"
    runs = tmp_path / "out" / "runs"
    first = runs / "0000-epochs1-seed0" / "run.json"
    second = runs / "0001-epochs24-seed0" / "state"

    def last_state() -> int:
        steps = [file.parent.name for file in second.glob("step*/state.json")]
        return max((int(name.removeprefix("step")) for name in steps), default=0)

    process = command(path, log)
    wait_for(lambda: first.exists() and last_state() > 0, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert "Run the same command again" in log.read_text()
    told = statuses(tmp_path)
    assert told.pop("0000-epochs1-seed0") == "FINISHED"
    assert set(told.values()) == {"KILLED"}, told
    assert read_json(tmp_path / "out" / "manifest.json")["status"] == "interrupted"
    finished_at, before = first.stat().st_mtime_ns, last_state()

    process = command(path, log)
    wait_for(lambda: last_state() > before, process, log)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL

    process = command(path, log)
    assert process.wait(240) == 0, log.read_text()
    assert first.stat().st_mtime_ns == finished_at, "a finished trial was run again"
    table = read_table(tmp_path / "out" / "trials.parquet").to_pandas()
    assert table["status"].tolist() == ["ok"] * 3
    assert table["epochs"].tolist() == [1, 24, 2]
    train = read_table(second.parent / "train.parquet").to_pandas()
    assert train["step"].tolist() == list(range(1, 145)), "every step once"
    told = statuses(tmp_path)
    assert len(told) == 4
    assert set(told.values()) == {"FINISHED"}, told
    assert "1 trials are finished already and skipped." in log.read_text()
    # A changed file is another sweep.
    values = yaml.safe_load(path.read_text())
    values["space"]["epochs"] = [1, 2]
    path.write_text(yaml.safe_dump(values))
    process = command(path, log)
    assert process.wait(60) == 2
    assert "give a new name" in log.read_text().splitlines()[-1]
