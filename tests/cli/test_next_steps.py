"""What a finished command says to type next works when it is typed."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from tiny_studies import tiny_pretrain, write_study

from ke_ray.cli import app
from ke_ray.cli.next_steps import after_results


def told(text: str) -> list[list[str]]:
    """The words of the commands after ``Next:``."""
    lines = re.findall(r"^  (.*)    # .+$", text.split("Next:\n")[1], re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_a_finished_pretraining_says_three_commands_that_work(
    ke_ray: Callable, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "my series"  # quoted where it has to be
    shutil.copytree(pretrained, output)
    study = tiny_pretrain(output)
    result = ke_ray("pretrain", write_study(study, tmp_path / "study.yaml"))
    assert result.code == 0, result.err
    commands = told(result.out)
    assert [words[:2] for words in commands] == [
        ["ke-ray", "scan"],
        ["ke-ray", "checkpoints"],
        ["ke-ray", "report"],
    ]
    for words in commands:
        more = ["--dry-run"] if words[1] == "scan" else []
        again = ke_ray(*words[1:], *more)
        assert again.code == 0, f"{words}: {again.err}"
    assert (tmp_path / "report.html").exists()


def test_results_lead_to_three_commands_and_failures_to_the_same_command_again(
    ke_ray: Callable, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ke-ray", "scan", "my study.yaml"])
    steps = after_results(str(pretrained), failed=False)
    failed = after_results(str(pretrained), failed=True)
    assert failed[0][0] == "ke-ray scan 'my study.yaml'"
    assert failed[1:] == steps[:2]
    commands = typer.main.get_command(app)
    for text, _ in steps:
        words = shlex.split(text)[1:]
        commands.make_context("ke-ray", list(words))  # its options are understood
        if words[0] != "dashboard":  # which runs until Ctrl-C
            assert ke_ray(*words).code == 0
