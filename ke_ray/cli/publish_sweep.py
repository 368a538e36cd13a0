"""Figures, report and tables on the MLflow run of a sweep."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray import storage
from ke_ray.errors import KeRayError

if TYPE_CHECKING:
    from ke_ray.tracking.tracker import Tracker

log = logging.getLogger(__name__)


#: Trials that are compared on one page; MLflow keeps 5,000 characters of a description.
_MAX_COMPARED = 50
_MAX_SETTINGS = 20


def publish_sweep(output: str, tracker: Tracker, run_id: str | None) -> None:
    """Log the tables, each figure as its own page, and the report of the folder.

    The description of the run has the best settings and a link to the comparison of its trials.
    Figures that cannot be drawn are left out; they do not fail the sweep.
    """
    if run_id is None:
        return
    run = tracker.run(run_id)
    run.describe(describe_sweep(output, tracker))
    from ke_ray.report.terminal import headline_rows, rows_as_csv

    run.log_text(rows_as_csv(headline_rows([output])), "headline.csv")
    for name in ("trials", "settings"):
        table = storage.read_table(storage.join(output, f"{name}.parquet"))
        run.log_text(table.to_pandas().to_csv(index=False), f"{name}.csv")
    with tempfile.TemporaryDirectory(prefix="ke_ray-") as temporary:
        try:
            for path in _figures(output, Path(temporary)):
                run.log_artifact(path, "figures")
        except KeRayError as error:
            log.warning("no figures: %s", error)
        run.flush()  # files are read when they are sent
    if storage.is_local(output):
        for name in ("trials.parquet", "settings.parquet", "manifest.json"):
            run.log_artifact(Path(storage.local_path(output), name))
    run.flush()


def settings_cells(output: str) -> list[list[str]] | None:
    """The settings of a sweep as rows of cells, repeats aggregated, best first objective first.

    The first row names the columns; None where no trial has ended. Values are in the units of the
    table (A and F as fractions), with 95 % intervals where there are any; a star marks the best
    setting, or the Pareto front.
    """
    path = storage.join(output, "settings.parquet")
    rows = storage.read_table(path).to_pylist() if storage.exists(path) else []
    if not rows:
        return None
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        points.setdefault(row["point"], {})[row["metric"]] = row
    sign = -1 if rows[0]["direction"] == "maximize" else 1

    def order(point: dict[str, Any]) -> tuple[bool, float]:
        value = point[metrics[0]]["value"]
        return value is None, sign * (value or 0.0)

    cells = [[*(f"{metric} (95 %)" for metric in metrics), "ok", "setting"]]
    for point in sorted(points.values(), key=order):
        first = point[metrics[0]]
        text = " ".join(f"{k}={_value(v)}" for k, v in json.loads(first["params"]).items())
        mark = " *" if first["on_front"] else ""
        cells.append([*(_cell(point[m]) for m in metrics), str(first["num_ok"]), text + mark])
    return cells


def _value(value: Any) -> str:
    return "none" if value is None else str(value)


def _cell(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "–"
    value, low, high = (
        None if number is None else f"{number:.4f}".replace("-0.0000", "0.0000")
        for number in (row["value"], row["low"], row["high"])
    )
    return f"{value} [{low}, {high}]" if low and high else str(value)


def describe_sweep(output: str, tracker: Tracker) -> str:
    """Markdown with the number of trials, a link to compare them, and the best settings."""
    from ke_ray.results.sweep_folder import read_trials

    rows = read_trials(output)
    run_ids = [row["mlflow_run_id"] for row in rows if row["mlflow_run_id"]]
    count = f"{len(rows)} trials in `{output}`."
    # The link comes first because MLflow hides the end of a long description.
    if 1 < len(run_ids) <= _MAX_COMPARED:
        text = [f"[Compare the trials]({tracker.compare_page(run_ids)}): {count}"]
    else:
        text = [f"{count} Select up to {_MAX_COMPARED} in the table of runs to compare them."]
    table = settings_cells(output)
    if table is not None:
        head, *lines = table
        gap = "&emsp;| "  # MLflow draws cells side by side without one
        shown = [f"| {gap.join(cells)} |" for cells in (head, *lines[:_MAX_SETTINGS])]
        text.append("\n".join([shown[0], "|" + "---|" * len(head), *shown[1:]]))
    if len(lines := (table or [])[1:]) > _MAX_SETTINGS:
        text.append(f"… and {len(lines) - _MAX_SETTINGS} more in `settings.csv`.")
    return "\n\n".join(text)


def _figures(output: str, folder: Path) -> list[Path]:
    """Write one HTML file per figure, and ``report.html`` with all of them."""
    from ke_ray.report.build import build_report
    from ke_ray.report.charts.sweep import sweep_figures
    from ke_ray.report.page import Section, page
    from ke_ray.report.sources import read_result

    pages = [Path(build_report([output], folder / "report.html"))]
    result = read_result(output, "sweep")
    figures, missing = sweep_figures(result, "sweep")
    for text in missing:
        log.info("%s", text)
    for figure in figures:
        title = getattr(figure, "title", figure.id)
        section = Section(figure.id, str(title), figures=[figure])
        path = folder / f"{storage.slug(figure.id)}.html"
        path.write_text(page(str(title), output, [], [section]), "utf-8")
        pages.append(path)
    return pages
