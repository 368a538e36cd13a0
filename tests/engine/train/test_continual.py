"""A study of several runs: failures are rows, finished runs stay, tables are joined."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_process import run_command, start_command
from tiny_studies import tiny_continual, write_study

from ke_ray.engine.train.continual import prepare_continual, run_continual_study
from ke_ray.errors import CheckpointSpecError, ResultsError
from ke_ray.outcomes import Display
from ke_ray.storage import read_json, read_table


class Recorder(Display):
    """Remembers what a study showed."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.amounts: list[tuple[int, int]] = []
        self.ended_runs: list[tuple[str, str]] = []

    def tokens(self, num_tokens: int, total: int, note: str = "") -> None:
        self.notes.append(note)
        self.amounts.append((num_tokens, total))

    def ended(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.ended_runs += [(name, row["status"]) for row in rows]


@pytest.fixture(scope="module")
def series(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretraining, and a checkpoint of it that is cut short."""
    folder = shutil.copytree(pretrained, tmp_path_factory.mktemp("broken") / "series")
    broken = folder / "checkpoints" / "step7"
    shutil.copytree(folder / "checkpoints" / "step10", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def test_a_broken_start_is_a_row_and_the_others_finish(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(tmp_path, series)
    shown = Recorder()
    outcome = run_continual_study(study, shown)
    assert [row["status"] for row in outcome.rows] == ["ok", "failed", "ok"]
    assert outcome.exit_code == 1
    assert outcome.failures[0][0] == "step7-seed0"
    assert "step7" in outcome.failures[0][1]
    assert {note.split(":")[0] for note in shown.notes} == {"step5-seed0", "step10-seed0"}
    assert shown.notes[0].endswith("next injection at 3")
    assert shown.ended_runs == [
        ("step5-seed0", "ok"),
        ("step7-seed0", "failed"),
        ("step10-seed0", "ok"),
    ]
    assert shown.amounts == sorted(shown.amounts)
    assert shown.amounts[-1][0] == shown.amounts[-1][1], "the last tokens are the total"
    runs = read_table(tmp_path / "runs.parquet").to_pylist()
    assert [r["run"] for r in runs] == ["step5-seed0", "step7-seed0", "step10-seed0"]
    assert runs[1]["acquisition"] is None
    train = read_table(tmp_path / "train.parquet").to_pandas()
    assert list(train.groupby("run").size()) == [6, 6]
    assert read_json(tmp_path / "manifest.json")["status"] == "failed"

    # The same command tries the failed run again, and only that.
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "step5-seed0").rglob("*.json")}
    shown = Recorder()
    again = run_continual_study(study, shown)
    assert again.num_skipped == 2
    assert again.exit_code == 1
    assert (shown.notes, shown.ended_runs) == ([], [("step7-seed0", "failed")])
    assert {p: p.stat().st_mtime_ns for p in kept} == kept

    # A narrower selection is finished; a further seed adds what is missing.
    narrow = tiny_continual(tmp_path, series, starts={"steps": "10:"}, seeds=(0, 1))
    more = run_continual_study(narrow)
    assert more.num_skipped == 1
    assert [row["run"] for row in more.rows] == ["step10-seed0", "step10-seed1"]
    assert more.exit_code == 0
    assert run_continual_study(narrow).num_skipped == 2

    with pytest.raises(ResultsError, match="optimizer.learning_rate was"):
        run_continual_study(tiny_continual(tmp_path, series, optimizer={"learning_rate": 0.1}))


def test_a_missing_tokenizer_stops_the_study_before_any_run(tmp_path: Path, series: Path) -> None:
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    for file in (copy / "checkpoints").rglob("tokenizer*.json"):
        file.unlink()
    study = tiny_continual(tmp_path / "out", copy)
    with pytest.raises(CheckpointSpecError, match=r"has no tokenizer\.json"):
        run_continual_study(study)
    assert not (tmp_path / "out" / "runs").exists()
    assert len(prepare_continual(tiny_continual(tmp_path / "out", series))) == 3


@pytest.mark.ray
def test_on_ray_the_same_rows_come_out(tmp_path: Path, series: Path, ray_cluster: None) -> None:
    starts = {"steps": "7:"}
    inline = run_continual_study(tiny_continual(tmp_path / "inline", series, starts=starts))
    keys = {"starts": starts, "executor": "ray", "cpus_per_worker": 1}
    study = tiny_continual(tmp_path / "ray", series, **keys)
    shown = Recorder()
    on_ray = run_continual_study(study, shown)
    assert [row["status"] for row in on_ray.rows] == ["failed", "ok"]
    for ours, theirs in zip(on_ray.rows, inline.rows, strict=True):
        for name in ("acquisition", "forgetting", "knowledge_entropy_after_nats"):
            if theirs.get(name) is None:
                assert ours.get(name) is None
            else:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    assert shown.notes
    assert [name for name, _ in shown.ended_runs] == [row["run"] for row in on_ray.rows]
    assert not (tmp_path / "ray" / "ray").exists()
    two = tiny_continual(
        tmp_path / "two",
        series,
        executor="ray",
        num_workers=2,
        micro_batch_size=2,
        strategy="fsdp",
        starts={"steps": "10:"},
    )
    sharded = run_continual_study(two)
    assert sharded.exit_code == 0
    assert sharded.rows[0]["acquisition"] == pytest.approx(inline.rows[-1]["acquisition"], abs=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_is_resumed_by_the_same_command(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(
        tmp_path / "out",
        series,
        **{"executor": "ray", "cpus_per_worker": 1, "starts": {"steps": "10:"}, "seeds": (0, 1)},
        **{"save_every": 2, "micro_batch_size": 1, "epochs": 10, "injection": {"every": 30}},
        **{"probes": {"every": 30}, "downstream": None, "held_out": None, "entropy": None},
    )
    file = write_study(study, tmp_path / "study.yaml")
    first, second = (tmp_path / "out" / "runs" / f"step10-seed{seed}" for seed in (0, 1))
    driver = start_command(["continual", file], tmp_path / "said.txt")
    deadline = time.monotonic() + 300
    while not list(second.glob("state/step*/state.json")):
        assert driver.returncode is None, driver.stdout
        assert time.monotonic() < deadline, driver.stdout
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = (first / "run.json").stat().st_mtime_ns
    assert not (second / "run.json").exists()
    time.sleep(5)  # Ray's processes notice that their driver is gone
    finished = run_command(["continual", file], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (first / "run.json").stat().st_mtime_ns == done
    rows = read_table(tmp_path / "out" / "runs.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    steps = read_table(tmp_path / "out" / "train.parquet").to_pandas().groupby("run")["step"]
    assert all(list(group) == list(range(1, 61)) for _, group in steps)
