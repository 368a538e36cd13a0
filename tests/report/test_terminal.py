"""Headline tables with sparklines, and the same rows for scripts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import synthetic
from rich.console import Console

from ke_ray.errors import UserError
from ke_ray.report.terminal import (
    headline_rows,
    print_results,
    rows_as_csv,
    rows_as_json,
    sparkline,
)


def _printed(*paths: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_results(paths, console)
    return console.export_text()


def test_sparkline_goes_from_minimum_to_maximum() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2, float("nan"), 1]) == "█·▁"
    assert sparkline([5, 5]) == "▄▄"
    assert sparkline([]) == ""
    assert len(sparkline(range(1000), 24)) == 24
    assert sparkline(range(1000), 24)[0] == "▁"
    assert sparkline(range(1000), 24)[-1] == "█"


def test_every_kind_is_printed_within_eighty_columns(demo_folder: Path) -> None:
    text = _printed(demo_folder)
    assert max(map(len, text.splitlines())) <= 80
    assert "knowledge_entropy  " in text
    assert "…\n" not in text
    assert "4·ln 64 = 16.64" in text
    assert "█" in text
    assert "p=0.5 q=2 random" in text
    assert "worker killed by signal 9" in text
    assert "pretrain" in text


def test_a_narrow_terminal_shows_the_same_digits(demo_folder: Path) -> None:
    """A number that is cut off reads like another number."""

    def count_digits(width: int) -> int:
        return sum(map(str.isdigit, _printed(demo_folder, width=width)))

    assert max(map(len, _printed(demo_folder, width=50).splitlines())) <= 50
    assert count_digits(50) == count_digits(70) == count_digits(200)


def test_a_failed_checkpoint_is_named_with_its_error(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], failed=("step2",))
    assert "model.safetensors is truncated" in _printed(folder).replace("\n", " ")
    rows = headline_rows([folder])
    assert [row["status"] for row in rows].count("failed") == 1
    assert "truncated" in rows[-1]["error"]


def test_rows_are_the_values_of_the_files(demo_folder: Path) -> None:
    rows = headline_rows([demo_folder])
    assert {row["kind"] for row in rows} == {"pretrain", "scan", "continual", "sweep"}
    assert json.loads(rows_as_json(rows)) == rows
    read = list(csv.DictReader(io.StringIO(rows_as_csv(rows))))
    assert len(read) == len(rows)
    scan = [row for row in rows if row["kind"] == "scan" and row["corpus"] == "biographies"]
    assert [row["step"] for row in scan] == [0, 10, 20, 40, 80, 160, 320, 640]
    assert scan[0]["knowledge_entropy"] > scan[-1]["knowledge_entropy"] > 0
    assert all(row["knowledge_entropy_stderr"] > 0 for row in scan)


def test_an_empty_folder_says_how_to_make_results(tmp_path: Path) -> None:
    assert "ke-ray demo" in _printed(tmp_path)
    with pytest.raises(UserError, match="There is no"):
        _printed(tmp_path / "nowhere")


def test_an_unfinished_scan_shows_what_has_finished(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], corpora=("a",))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"status": "running", "identity": {"corpora": {"a": "x"}}})
    )
    parts = folder / "parts"
    parts.mkdir()
    later = synthetic.make_scan(tmp_path / "later", steps=[7], corpora=("a",))
    (later / "entropy.parquet").rename(parts / "step7-x.entropy.parquet")
    text = _printed(folder, width=100)
    assert "Unfinished" in text
    assert "3 checkpoints, step0 … step7" in text
