"""``ke-ray demo`` as a newcomer runs it, and once more; what the documents say of it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jupytext
import pandas as pd
import pytest
from installed import Installed

from ke_ray.report.build import sections
from ke_ray.report.sources import find_results

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

CHECKOUT = Path(__file__).parents[2]


def run_demo(installed: Installed, folder: Path) -> subprocess.CompletedProcess[str]:
    """``ke-ray demo`` from the wheel; its results lie in ``runs/demo`` of ``folder``."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "OMP_NUM_THREADS")
    }
    return installed.run(folder, "demo", environment=environment, timeout_s=1400)


class Demo(NamedTuple):
    """ke_ray as it is installed, an empty folder, the demo's inside, and what the command said."""

    installed: Installed
    empty: Path
    folder: Path
    first: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def demo(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    empty = tmp_path_factory.mktemp("empty")
    first = run_demo(installed, empty)
    assert first.returncode == 0, first.stderr
    return Demo(installed, empty, empty / "runs" / "demo", first)


def test_the_demo_runs_whole_from_an_empty_folder_and_then_skips_what_is_done(demo):
    folder, first = demo.folder, demo.first
    assert "Traceback" not in first.stderr
    summary = json.loads((folder / "summary.json").read_text())

    scan = summary["scan"]
    steps = [entry["step"] for entry in scan]
    assert (len(steps), steps[0], steps) == (12, 0, sorted(set(steps)))
    ceiling = 2 * math.log(512)
    values = [entry["knowledge_entropy_nats"] for entry in scan]
    assert all(0 < value < ceiling for value in values)
    # The demo's story: near the ceiling before training, a dip, a rise to a peak, and the decay.
    peak = max(range(1, len(values)), key=values.__getitem__)
    assert values[0] > values[peak] > values[1]
    error = max(entry["stderr_nats"] for entry in (scan[peak], scan[-1]))
    assert values[peak] - values[-1] > 20 * error
    assert "The fall after the peak is the decay" in first.stdout

    continual = summary["continual"]
    assert [entry["step"] for entry in continual] == [80, steps[peak], steps[-1]]
    for entry in continual:
        assert entry["acquisition_low"] <= entry["acquisition"] <= entry["acquisition_high"]
        assert entry["forgetting_low"] <= entry["forgetting"] <= entry["forgetting_high"]
        # Facts that are injected become likelier, from any start.
        assert entry["probe_logprob_after"] > entry["probe_logprob_before"]
        before, after = entry["probe_logprob_before"], entry["probe_logprob_after"]
        assert entry["acquisition"] == pytest.approx((after - before) / abs(before))

    trials = summary["sweep"]
    assert [t["parameters"]["resuscitation.factor"] for t in trials] == [None, 0.5, 1, 2]
    for trial in trials:
        assert trial["status"] == "ok"
        assert all(isinstance(trial[name], float) for name in ("acquisition", "forgetting"))

    phases = summary["phases_s"]
    assert {"pretrain", "pretrain_start", "scan", "scan_start", "continual"} <= phases.keys()
    assert (folder / "scan" / "entropy.png").stat().st_size > 10_000
    assert b"<svg" in (folder / "report.html").read_bytes()

    again = run_demo(demo.installed, demo.empty)
    assert again.returncode == 0, again.stderr
    assert "Pretraining is finished already and skipped" in again.stdout
    assert f"{len(scan)} skipped" in again.stdout
    assert "3 skipped" in again.stdout
    assert json.loads((folder / "summary.json").read_text()) == summary

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("ke_ray demo")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds = [run.data.tags["ke_ray.kind"] for run in runs]
    assert kinds.count("scan") == kinds.count("pretrain") == 1
    found = {run.info.run_id: run.data for run in runs}
    for trial in trials:
        child = found[trial["mlflow_run_id"]]
        assert child.metrics["result/acquisition"] == pytest.approx(trial["acquisition"])
        assert found[child.tags["mlflow.parentRunId"]].tags["ke_ray.kind"] == "sweep"


def test_the_notebook_finds_in_the_results_what_the_demo_says(demo, tmp_path, monkeypatch):
    folder = shutil.copytree(demo.folder, tmp_path / "demo")
    monkeypatch.setenv("DEMO", str(folder))
    notebook = jupytext.read(CHECKOUT / "docs" / "demo_results.py")
    names: dict[str, object] = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"<cell {number}>", "exec"), names)  # our own file
    summary = json.loads((folder / "summary.json").read_text())
    stored = {entry["step"]: entry["knowledge_entropy_nats"] for entry in summary["scan"]}
    assert dict(names["curve"]) == pytest.approx(stored)
    assert names["recomputed"] == pytest.approx(stored[names["last"]], abs=1e-5)
    assert names["difference"] == pytest.approx(stored[names["last"]] - stored[names["peak"]])
    assert 0 < names["stderr"] < 0.01
    assert all(0 < value < 1 for value in names["overlap"])
    assert list(names["runs"]["acquisition"]) == [e["acquisition"] for e in summary["continual"]]
    assert len(names["trials"]) == len(summary["sweep"])
    assert isinstance(names["totals"], pd.DataFrame)
    assert b"<svg" in (folder / "report.html").read_bytes()


def test_the_tour_names_the_figures_of_the_report(demo):
    page = " ".join((CHECKOUT / "docs" / "demo.md").read_text().split())
    named = re.findall(r"\*\*([^*]+?)\.?\*\*", page)
    results = find_results([demo.folder])
    drawn = {figure.title for part in sections(results) for figure in part.figures}
    assert [title for title in named if title not in drawn] == []
    assert drawn - {*named, "Change since the first checkpoint"} == set()
