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


@pytest.mark.slow
def test_a_stopped_command_leaves_a_truthful_manifest(tmp_path: Path) -> None:
    output = tmp_path / "out"
    study = tiny_pretrain(output, num_steps=100_000, checkpoints={"steps": [0]})
    path = write_study(study, tmp_path / "study.yaml")
    running = start_command(["pretrain", str(path)], tmp_path / "said.txt")
    while status_of(output) != "running":
        assert running.returncode is None, running.stderr
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(120) == 130, running.stderr
    assert "Run the same command again to resume" in running.stderr
    assert status_of(output) == "interrupted"


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
