"""What a command that ends in the middle leaves: a truthful manifest, and work for the next one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from command_process import run_command, start_command
from tiny_studies import tiny_continual, tiny_pretrain, write_study


def status_of(folder: Path) -> str | None:
    path = folder / "manifest.json"
    return json.loads(path.read_text())["status"] if path.is_file() else None


def stopped(command: str, study: object, folder: Path) -> str:
    """What a study's command printed that got SIGTERM once its run stood in its manifest."""
    output = Path(study.output)
    path = write_study(study, folder / "study.yaml")
    running = start_command([command, str(path)], folder / "said.txt")
    while status_of(output) != "running":
        assert running.returncode is None, running.stderr
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 130, running.stderr
    assert status_of(output) == "interrupted"
    return running.stderr


@pytest.mark.slow
def test_a_stopped_pretraining_leaves_a_truthful_manifest(tmp_path: Path) -> None:
    study = tiny_pretrain(tmp_path / "out", num_steps=100_000, checkpoints={"steps": [0]})
    assert "Run the same command again to resume" in stopped("pretrain", study, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_stopped_continual_study_leaves_a_truthful_manifest(
    pretrained: Path, tmp_path: Path, executor: str
) -> None:
    study = tiny_continual(tmp_path / "out", pretrained, executor=executor, epochs=10_000)
    assert "Run the same command again to resume" in stopped("continual", study, tmp_path)


@pytest.mark.slow
def test_a_report_that_a_kill_prevented_is_made_by_the_next_command(
    pretrained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    study = tiny_continual(output, pretrained, executor="inline", downstream=None)
    command = ["continual", str(write_study(study, tmp_path / "study.yaml"))]
    assert run_command(command, tmp_path).returncode == 0
    (output / "report.html").unlink()  # as after a kill between "finished" and the report
    assert run_command(command, tmp_path).returncode == 0
    assert (output / "report.html").is_file()
