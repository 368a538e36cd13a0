"""Results that somebody else made: what they can show, and what they cannot do."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from rich.console import Console

from ke_ray import storage
from ke_ray.data.documents import iter_documents
from ke_ray.errors import StorageError
from ke_ray.report.build import build_report
from ke_ray.report.sources import find_results
from ke_ray.report.terminal import headline_rows, print_results, rows_as_csv
from ke_ray.storage import tables

ROOT = Path(__file__).parents[2]
TITLE = "\x1b]0;taken\x07"
IMAGE = "![x](http://192.0.2.1/pixel.png) <b>bold</b> $x$ :red[red] www.example.com"
MARKUP = "[link=http://192.0.2.1]name[/link] :bomb:"


@pytest.fixture
def hostile_scan(tmp_path: Path) -> Path:
    """A scan whose names hold a terminal's control sequences, rich's markup and Markdown."""
    folder = synthetic.make_scan(tmp_path / "scan", steps=[0, 1], failed=("step2",))
    table = pq.read_table(folder / "entropy.parquet").to_pandas()
    table["corpus"] = table["corpus"].replace("biographies", TITLE + IMAGE)
    table["checkpoint"] = table["checkpoint"].replace("step1", "step1" + MARKUP)
    table["error"] = table["error"].where(table["error"].isna(), TITLE + IMAGE)
    table["measure"] = table["measure"].replace("gini", MARKUP)
    table["listed"] = [[1, 2]] * len(table)
    table.to_parquet(folder / "entropy.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["command"] = TITLE
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_terminal_gets_no_control_sequences_and_reads_no_markup(hostile_scan: Path) -> None:
    terminal = io.StringIO()
    print_results([hostile_scan], Console(file=terminal, force_terminal=True, width=300))
    text = terminal.getvalue()
    assert "\\x1b]0;taken\\x07" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\x1b(?!\[[\d;]*m)", text)
    assert "[link=" in text
    assert ":bomb:" in text
    assert "\x1b" not in rows_as_csv(headline_rows([hostile_scan]))


def test_a_column_of_lists_is_left_out_with_a_note(hostile_scan: Path, tmp_path: Path) -> None:
    result = find_results([hostile_scan])[0]
    assert "listed" not in result.table("entropy")
    assert any("'listed' is left out" in note for note in result.notes)
    build_report([hostile_scan], tmp_path / "report.html")


def test_the_dashboard_reads_no_markdown_of_results(
    hostile_scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")
    page = ROOT / "dashboards" / "explore.py"
    monkeypatch.setattr(sys, "argv", ["explore.py", str(hostile_scan)])
    monkeypatch.syspath_prepend(str(page.parent))
    # The page runs as `__main__` and would stay so, also for processes that later tests start.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    run = testing.AppTest.from_file(str(page), default_timeout=120).run()
    assert not run.exception
    texts = [
        element.value
        for kind in ("caption", "warning", "info", "subheader", "header", "markdown")
        for element in getattr(run, kind)
    ]
    texts += [metric.label for metric in run.metric]
    texts += [expander.label for expander in run.expander]
    assert any("pixel" in text for text in texts), "the hostile name is shown nowhere"
    for text in texts:
        bare = re.sub(r"\\.", "", text)  # without what a backslash makes literal
        assert not re.search(r"[\[\]<>$]|https?:|www\.|:red", bare), text


def bombs(folder: Path) -> dict[str, Path]:
    """Small files that stand for much: by a dictionary, by rows, by wide values."""
    zeros = np.zeros(2_000, np.int32)
    contents = {
        "dictionary": pa.table({"corpus": pa.DictionaryArray.from_arrays(zeros, ["x" * 10**6])}),
        "rows": pa.table({"value": np.zeros(5_000_000)}),
        "wide": pa.table({"x": pa.array([b"x" * 10**6] * 10, pa.binary(10**6))}),
    }
    for name, table in contents.items():
        pq.write_table(
            table,
            folder / f"{name}.parquet",
            compression="zstd",
            write_statistics=False,
            dictionary_pagesize_limit=10**7,
        )
    return {name: folder / f"{name}.parquet" for name in contents}


def test_a_text_that_stands_in_every_row_is_read_once_a_row(tmp_path: Path) -> None:
    path = bombs(tmp_path)["dictionary"]
    documents = itertools.islice(iter_documents(f"{path}#corpus"), 300)
    assert {len(text) for text, _ in documents} == {10**6}
    assert pa.default_memory_pool().max_memory() < 200e6


def test_bombs_are_refused_before_they_burst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = bombs(tmp_path)
    for name, expected in {
        "dictionary": "1,073,741,824 bytes in memory",
        "wide": "1,000,000 bytes",
        "rows": "30,000,000 bytes in memory.*of 5,000,000 rows",
    }.items():
        assert paths[name].stat().st_size < 20_000
        if name == "rows":
            monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 30_000_000)
        with pytest.raises(StorageError, match=expected):
            storage.read_table(paths[name])
    # The largest allocation of this process so far: 2 GB, had the dictionary been written out.
    assert pa.default_memory_pool().max_memory() < 1e9
