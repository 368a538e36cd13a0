"""A sweep in MLflow's own pages: what only a person who compares its trials there would see."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_sweep import tiny_sweep

from ke_ray.cli.publish_sweep import publish_sweep
from ke_ray.engine.sweep.run import _Run, collect_sweep
from ke_ray.outcomes import Display, SweepOutcome
from ke_ray.planning.sweep import prepare_sweep
from ke_ray.results.sweep_folder import objective_value
from ke_ray.tracking.tracker import Tracker
from ke_ray.training.continual import run_continual

pytestmark = pytest.mark.browser

_WAIT_MS = 60_000
_SETTINGS = {"none": "0000-no-resuscitation", "0.5": "0001-factor0.5", "2.0": "0002-factor2"}


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, pretrained: Path, mlflow_server: str
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The page of an experiment that a real sweep filled, and its trials' A and F.

    Trials run here one after another, as an actor of Ray's would; the driver's part is its own.
    """
    settings = {"uri": mlflow_server, "experiment": "compared"}
    study = tiny_sweep(tmp_path_factory.mktemp("swept") / "sweep", pretrained, mlflow=settings)
    plan = prepare_sweep(study)
    with Tracker(study.mlflow) as tracker:
        driver = _Run(plan, tracker, Display())
        driver.parent = tracker.start_run("tiny sweep", key="sweep", kind="sweep")
        driver._write_start()
        for trial in plan.trials:
            run_continual(trial.study, trial.spec, parent_id=driver.parent.run_id)
            driver.settle(trial, {}, False)
        outcome = SweepOutcome(study.output)
        collect_sweep(plan, outcome)
        publish_sweep(study.output, tracker, driver.parent.run_id)
        driver.parent.finish()
        driver.parent.flush()
    assert outcome.exit_code == 0, outcome.failures
    columns = ("acquisition", "forgetting", "acquisition_vs_original", "forgetting_vs_original")
    found = {r["trial_id"]: {c: objective_value(r, c) for c in columns} for r in outcome.rows}
    return f"{mlflow_server}/#/experiments/{tracker.experiment_id}/runs", found


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """MLflow complains on the console by itself, so nothing is asserted of that here."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000}, locale="en-US")
    # Its assistant opens over a quarter of the page on a first visit.
    context.add_init_script(
        "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
        "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
    )
    context.set_default_timeout(_WAIT_MS)
    yield context.new_page()
    context.close()


def _table(page: Any, number: int) -> dict[str, list[str]]:
    """A table of the comparison: its first column → the cells of each run."""
    rows = page.locator(".mlflow-compare-run-table").nth(number).locator("tbody tr")
    cells = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if row}


def _metrics(page: Any) -> dict[str, list[str]]:
    """The metrics of the comparison, whose rows exist only while they are in view."""
    found: dict[str, list[str]] = page.evaluate(
        """async () => {
            const [names, values] = [...document.querySelectorAll(".ReactVirtualized__Grid")]
                .filter((grid) => grid.clientHeight > 0).slice(-2);
            const cells = (grid) => [...grid.firstElementChild.children];
            const found = {};
            for (let top = 0; top < values.scrollHeight; top += 100) {
                values.scrollTop = top;
                await new Promise((done) => setTimeout(done, 100));
                for (const name of cells(names)) {
                    const row = cells(values).filter((c) => c.style.top === name.style.top)
                        .sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left))
                        .map((cell) => cell.textContent);
                    if (row.length >= (found[name.textContent] ?? []).length)
                        found[name.textContent] = row;
                }
            }
            return found;
        }"""
    )
    return found


def _choose(page: Any, number: int, wanted: list[str]) -> None:
    """Choose entries of one of the plot's two lists (0 parameters, 1 metrics) by keyboard."""
    page.get_by_role("combobox").nth(number).focus()
    active = page.locator(".du-bois-light-select-item-option-active")
    page.keyboard.press("ArrowDown")
    for name in wanted:
        for _ in range(80):
            if active.get_attribute("title") == name:
                break
            page.keyboard.press("ArrowDown")
        assert active.get_attribute("title") == name
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")


def test_a_sweeps_trials_are_compared(
    swept: tuple[str, dict[str, dict[str, float]]],
    page: Any,
    tmp_path: Path,
) -> None:
    address, trials = swept
    page.goto(f"{address}?workflowType=machine_learning")
    # The sweep is one line; its trials are one level below it.
    parent = page.get_by_role("link", name="tiny sweep", exact=True)
    parent.wait_for()
    children = page.get_by_role("link", name=re.compile("-seed0$"))
    assert children.count() == 0
    expanders = page.locator("[role=row] button:has(svg):near(:text('tiny sweep'), 60)")
    expanders.first.click()
    children.first.wait_for()
    assert sorted(children.all_inner_texts()) == sorted(trials)
    page.screenshot(path=tmp_path / "runs.png")

    # From the sweep's description one click leads to the comparison.
    parent.click()
    link = page.get_by_role("link", name="Compare the trials")
    link.wait_for()
    page.get_by_text("acquisition (95 %)").wait_for()
    page.screenshot(path=tmp_path / "sweep.png")
    with page.context.expect_page() as opened:
        link.click()
    comparison = opened.value
    comparison.get_by_text(f"Comparing {len(trials)} Runs from 1 Experiment").wait_for()
    comparison.screenshot(path=tmp_path / "first.png")

    details, params = (_table(comparison, number) for number in range(2))
    names = details["Run Name:"]
    assert sorted(names) == sorted(trials)
    for name, factor in zip(names, params["resuscitation.factor"], strict=True):
        assert name == f"{_SETTINGS[factor]}-seed0"
    metrics = _metrics(comparison)
    for metric in trials[names[0]]:
        shown = metrics[f"result/{metric}"]
        for name, text in zip(names, shown, strict=True):
            expected = pytest.approx(trials[name][metric], abs=6e-4, rel=2e-3)
            assert float(text) == expected, (metric, name)

    # The plot takes the first three parameters that differ: those of resuscitation.
    axes = comparison.locator(".pcp-plot .axis-title")
    axes.first.wait_for()
    assert axes.all_text_contents()[:2] == ["resuscitation.factor", "resuscitation.ratio"]
    _choose(comparison, 1, ["result/acquisition", "result/forgetting"])
    axes.filter(has_text="result/forgetting").wait_for()
    plot = comparison.locator(".pcp-plot")
    pixels = np.asarray(Image.open(io.BytesIO(plot.screenshot())).convert("RGB")).astype(int)
    coloured = int((pixels.max(-1) - pixels.min(-1) > 60).sum())
    comparison.screenshot(path=tmp_path / "comparison.png")
    assert coloured > 500, "no lines were drawn"
