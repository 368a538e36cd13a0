"""``ke-ray sweep``: dry runs without a network, bad input, interrupts and kills of the driver."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_process import run_command, start_command
from tiny_studies import write_study
from tiny_sweep import tiny_sweep
from waiting import wait_for

from ke_ray.results.status import read_status
from ke_ray.storage import read_json, read_table

SWEEPS = Path(__file__).parents[2] / "sweeps"
SHIPPED = ["demo", "resuscitation_q", "resuscitation_p", "resuscitation_stage", "table1", "pareto"]


@pytest.fixture
def series(pretrained: Path) -> Path:
    return pretrained


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
    if name in ("table1", "demo"):
        assert ("activations" in result.out) == (name == "table1")
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
    return write_study(study, folder / "sweep.yaml")


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


def statuses(folder: Path) -> dict[str, str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return {r.info.run_name: r.info.status for r in client.search_runs(experiments)}


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_file_goes_on_after_the_driver_ended(series, tmp_path):
    path = write(
        tmp_path,
        series,
        base={"save_every": 4, "injection": None},
        objectives=["forgetting"],
        space={"epochs": [1, 12]},
        points=[],
        max_concurrent=1,
    )
    runs = tmp_path / "out" / "runs"
    first = runs / "0000-epochs1-seed0" / "run.json"
    second = runs / "0001-epochs12-seed0" / "state"

    def last_state() -> int:
        steps = [file.parent.name for file in second.glob("step*/state.json")]
        return max((int(name.removeprefix("step")) for name in steps), default=0)

    command = start_command(["sweep", path], tmp_path / "said.txt")
    wait_for(lambda: first.exists() and last_state() > 0, command)
    (study,) = read_status(str(tmp_path / "out"))
    assert (study.state, study.total, study.failed) == ("running", 2, 0)
    command.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stdout
    assert "2 trials: 1 done, 0 failed, 1 left.\n" in command.stdout
    assert "Run the same command again" in command.stdout
    told = statuses(tmp_path)
    assert told.pop("0000-epochs1-seed0") == "FINISHED"
    assert set(told.values()) == {"KILLED"}, told
    assert read_json(tmp_path / "out" / "manifest.json")["status"] == "interrupted"
    finished_at, before = first.stat().st_mtime_ns, last_state()

    command = start_command(["sweep", path], tmp_path / "said.txt")
    wait_for(lambda: last_state() > before, command)
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL

    command = start_command(["sweep", path], tmp_path / "said.txt")
    assert command.wait() == 0, command.stdout
    assert first.stat().st_mtime_ns == finished_at, "a finished trial was run again"
    table = read_table(tmp_path / "out" / "trials.parquet").to_pandas()
    assert table["status"].tolist() == ["ok"] * 2
    assert table["epochs"].tolist() == [1, 12]
    train = read_table(second.parent / "train.parquet").to_pandas()
    assert train["step"].tolist() == list(range(1, 73)), "every step once"
    told = statuses(tmp_path)
    assert len(told) == 3
    assert set(told.values()) == {"FINISHED"}, told
    assert "1 trials are finished already and skipped." in command.stdout
    # A changed file is another sweep.
    values = yaml.safe_load(path.read_text())
    values["space"]["epochs"] = [1]
    path.write_text(yaml.safe_dump(values))
    changed = run_command(["sweep", path], tmp_path)
    assert changed.returncode == 2
    assert "space.epochs.choice was [1, 12], is [1]" in changed.stderr
    assert "another output folder" in changed.stderr
