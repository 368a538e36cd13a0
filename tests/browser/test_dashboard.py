"""The interactive page in a real browser, on results that change under it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from PIL import Image

from ke_ray.errors import UserError
from ke_ray.report.dashboard import Dashboard, start_dashboard

pytestmark = pytest.mark.browser

_WAIT_MS = 90_000
_CHART = "[data-testid=stVegaLiteChart]"


def _complain(message: str) -> None:
    print(message)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path_factory.mktemp("page") / "demo"))


@pytest.fixture(scope="module")
def dashboard(chromium: Any, results: Path) -> Iterator[Dashboard]:
    pytest.importorskip("streamlit", reason="streamlit is not installed")
    log = results.parent / "pages.log"
    with start_dashboard([results], log=log, say=_complain) as running:
        yield running
    assert all(process.poll() is not None for process in running.processes)


def _ready(page: Any) -> Any:
    page.locator(f"{_CHART} svg").first.wait_for(timeout=_WAIT_MS)
    return page


def _wait_for_title(page: Any, words: str) -> None:
    titles = page.locator(f"{_CHART} .role-axis-title text", has_text=words)
    titles.first.wait_for(timeout=_WAIT_MS)


def test_all_servers_listen_on_loopback_alone(dashboard: Dashboard) -> None:
    import psutil

    family = [psutil.Process(started.pid) for started in dashboard.processes]
    family += [child for process in family for child in process.children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_figures_are_drawn(
    dashboard: Dashboard, open_page: Callable, width: int, dark: bool
) -> None:
    page = _ready(open_page(dashboard.url, width=width, dark=dark))
    lines = page.locator(_CHART).first.locator(".mark-line path")
    assert lines.count() >= 2
    box = lines.first.bounding_box()
    assert box["width"] > width * 0.2
    assert box["height"] > 50
    titles = page.locator(_CHART).first.locator(".role-axis-title text").all_text_contents()
    assert {"knowledge entropy (nats)", "pretraining step"} <= set(titles)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    brightness = sum(int(part) for part in re.findall(r"\d+", paper)[:3])
    assert brightness < 200 if dark else brightness > 600


def test_menus_change_what_is_shown(dashboard: Dashboard, open_page: Callable) -> None:
    page = _ready(open_page(dashboard.url))
    page.get_by_role("combobox", name="Measure").click()
    page.get_by_role("option", name="Gini coefficient").click()
    _wait_for_title(page, "gini coefficient (fraction)")
    page.get_by_text("Change since the first checkpoint", exact=True).click()
    _wait_for_title(page, "change of gini coefficient")
    page.get_by_role("combobox", name="Layers").click()
    page.get_by_role("option", name="3", exact=True).click()
    name = page.locator(f"{_CHART} .role-legend-label text", has_text="biographies, layer 3")
    name.first.wait_for(timeout=_WAIT_MS)


def test_two_checkpoints_are_compared(dashboard: Dashboard, open_page: Callable) -> None:
    page = _ready(open_page(dashboard.url))
    page.get_by_text("Compare two checkpoints of scan").click()
    page.get_by_role("combobox", name="From").wait_for(timeout=_WAIT_MS)
    page.locator("[data-testid=stExpander] [data-testid=stDataFrame]").last.wait_for(
        timeout=_WAIT_MS
    )


def test_runs_and_trials_have_their_figures(dashboard: Dashboard, open_page: Callable) -> None:
    page = _ready(open_page(dashboard.url))
    page.get_by_text("Checkpoints", exact=True).click()  # again: a choice is never taken back
    assert page.locator(_CHART).count() > 0
    page.get_by_text("Continual learning", exact=True).click()
    page.get_by_text("Acquisition A by starting stage").wait_for(timeout=_WAIT_MS)
    _wait_for_title(page, "Acquisition A (%)")
    page.get_by_text("Sweeps", exact=True).click()
    page.get_by_text("Resuscitation ratio × amplifying factor").wait_for(timeout=_WAIT_MS)
    page.locator(f"{_CHART} .mark-rect path").first.wait_for(timeout=_WAIT_MS)


def test_the_page_is_worked_by_keyboard(dashboard: Dashboard, open_page: Callable) -> None:
    page = _ready(open_page(dashboard.url))
    target = page.get_by_role("radio", name="Sweeps").or_(page.get_by_role("button", name="Sweeps"))
    for _ in range(80):
        page.keyboard.press("Tab")
        if target.first.evaluate("node => node === document.activeElement"):
            break
        focused = page.evaluate("document.activeElement.textContent")
        if focused == "Checkpoints":  # a group of choices is one stop; arrows move inside
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            break
    page.keyboard.press("Enter")
    page.get_by_text("Over the amplifying factor q").wait_for(timeout=_WAIT_MS)


def test_a_running_scan_is_followed(
    dashboard: Dashboard, open_page: Callable, results: Path, tmp_path: Path
) -> None:
    page = _ready(open_page(dashboard.url))
    page.get_by_role("combobox", name="Follow running work").click()
    page.get_by_role("option", name="every 2 s").click()
    tile = page.locator("[data-testid=stMetricValue]").first
    assert tile.inner_text() == "8"
    more = synthetic.make_scan(tmp_path / "more", steps=[1280])
    for name in ("entropy", "replicates"):
        target = results / "scan" / f"{name}.parquet"
        tables = [pq.read_table(folder / f"{name}.parquet") for folder in (results / "scan", more)]
        pq.write_table(pa.concat_tables(tables), tmp_path / "joined.parquet")
        shutil.copy(tmp_path / "joined.parquet", target)
    page.wait_for_function(
        "document.querySelector('[data-testid=stMetricValue]').innerText === '9'",
        timeout=_WAIT_MS,
    )
    ticks = page.locator(f"{_CHART} .role-axis-label text", has_text="1,200")
    ticks.first.wait_for(timeout=_WAIT_MS)


def test_no_results_says_how_to_make_some(
    chromium: Any, open_page: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("streamlit", reason="streamlit is not installed")
    with start_dashboard([tmp_path], say=_complain) as running:
        page = open_page(running.url)
        page.get_by_text("ke-ray demo").first.wait_for(timeout=_WAIT_MS)
        page.context.close()  # before its server goes, which the page would complain about


@pytest.mark.slow
def test_mlflow_stands_beside_and_runs_are_linked(
    chromium: Any, open_page: Callable, demo_folder: Path, tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    root = Path(shutil.copytree(demo_folder, tmp_path / "demo"))
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.create_experiment("knowledge", artifact_location=str(tmp_path / "art"))
    run = client.create_run(experiment, run_name="continual of step640")
    client.log_metric(run.info.run_id, "acquisition", 0.25)
    client.set_terminated(run.info.run_id)
    with start_dashboard([root], log=tmp_path / "log", say=_complain) as running:
        assert running.mlflow_url is not None
        with urllib.request.urlopen(f"{running.mlflow_url}/health") as answer:
            assert answer.status == 200
        page = _ready(open_page(running.url))
        page.get_by_text("MLflow", exact=True).first.click()
        page.get_by_role("combobox", name="Experiment").wait_for(timeout=_WAIT_MS)
        body = json.dumps({"experiment_ids": [experiment]}).encode()
        request = urllib.request.Request(
            f"{running.mlflow_url}/api/2.0/mlflow/runs/search",
            data=body,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["runs"][0]["info"]["run_name"] == "continual of step640"
        href = page.get_by_role("link", name="Open MLflow").get_attribute("href")
        assert href.rstrip("/") == running.mlflow_url
        page.context.close()


@pytest.mark.slow
def test_the_screenshots_of_the_readme_are_made(
    chromium: Any, demo_folder: Path, tmp_path: Path
) -> None:
    # In a process of its own, as a user runs it: one process holds one playwright.
    command = [sys.executable, "-m", "ke_ray.report.screenshots", str(demo_folder)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for name in ("report.png", "dashboard.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        assert pixels.shape[1] == 1280
        assert int((np.abs(pixels - [0, 114, 178]).max(-1) < 12).sum()) > 100


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            start_dashboard([tmp_path], port=taken.getsockname()[1], say=_complain)
