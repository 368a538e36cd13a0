"""The display on a narrow terminal, in a log file, and in the output folder."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ke_ray import storage
from ke_ray.cli.progress import TerminalDisplay
from ke_ray.storage.ownership import PROGRESS

DISPLAY = """
import sys, time
from ke_ray.cli.progress import TerminalDisplay
display = TerminalDisplay("scan", "checkpoints", sys.argv[1])
display.start(num_items=40, num_skipped=2, note="4 at a time")
for number in range(8):
    display.tokens(1000 * number, 40_000, "step7-tokens3B: a note that is longer than the line")
    time.sleep(0.15)
    display.ended(f"step{number}", [{"status": "ok" if number else "failed", "error": "torn"}])
display.stop()
"""


def displayed(output: Path, columns: int | None) -> str:
    """What the display writes to a terminal of so many columns, or (None) to a pipe."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "LINES": "24"}
    command = [sys.executable, "-c", DISPLAY, str(output)]
    if columns is None:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return run.stderr
    master, slave = pty.openpty()
    environment["COLUMNS"] = str(columns)
    process = subprocess.Popen(command, env=environment, stderr=slave)
    os.close(slave)
    text = b""
    try:
        while part := os.read(master, 65536):
            text += part
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait() == 0
    return text.decode()


@pytest.mark.parametrize("columns", [30, 48, 80])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, columns: int) -> None:
    text = displayed(tmp_path, columns)
    assert "\x1b[" in text, "a live display"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    drawn = [line for line in re.split(r"[\r\n]+", plain) if re.search(r"\d:\d\d:\d\d$", line)]
    assert drawn
    assert max(map(len, drawn)) <= columns
    assert any(line[2:].startswith("scan") for line in drawn)


def test_a_log_has_plain_lines_whatever_the_environment_forces(tmp_path: Path) -> None:
    text = displayed(tmp_path, None)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert text.splitlines()[:2] == [
        "2 checkpoints are finished already and skipped.",
        "scan: 40 checkpoints, 4 at a time",
    ]
    assert text.splitlines()[-1].startswith("scan: 7 done, 1 failed, 32 left, about ")


def test_the_progress_is_kept_in_the_folder_until_the_command_stops(tmp_path: Path) -> None:
    display = TerminalDisplay("sweep", "trials", str(tmp_path))
    display.start(num_items=3, num_skipped=2)
    kept = storage.read_json(tmp_path / PROGRESS)
    assert (kept["total"], kept["done"], kept["left"]) == (5, 2, 3)
    assert (kept["host"], kept["pid"]) == (os.uname().nodename, os.getpid())
    display.stop()
    display.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    display = TerminalDisplay("sweep", "trials", str(tmp_path / "file" / "inside"))
    display.start(num_items=1, num_skipped=0)
    display.ended("a", [{"status": "ok"}])
    display.stop()
