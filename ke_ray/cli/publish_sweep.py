"""What a sweep leaves on its MLflow run for people: figures, the report, the trial table."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray import storage
from ke_ray.errors import KeRayError

if TYPE_CHECKING:
    from ke_ray.tracking import TrackedRun

__all__ = ["publish_sweep"]

log = logging.getLogger(__name__)


def publish_sweep(output: str, run: TrackedRun) -> None:
    """Log the tables, each figure as a page of its own, and the report of the folder.

    Nothing here can fail a sweep: what cannot be drawn is left out.
    """
    if run.run_id is None:
        return
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


def _figures(output: str, folder: Path) -> list[Path]:
    """One HTML file a figure, and ``report.html`` with all of them."""
    from ke_ray.report.build import build_report
    from ke_ray.report.page import Section, page
    from ke_ray.report.parallel import parallel_coordinates
    from ke_ray.report.sources import read_result
    from ke_ray.report.sweep_figures import sweep_figures

    made = [Path(build_report([output], folder / "report.html"))]
    result = read_result(output, "sweep")
    figures, missing = sweep_figures(result, "sweep")
    for text in missing:
        log.info("%s", text)
    for figure in figures:
        title = getattr(figure, "title", figure.id)
        section = Section(figure.id, str(title), figures=[figure])
        path = folder / f"{storage.slug(figure.id)}.html"
        path.write_text(page(str(title), output, [], [section]), "utf-8")
        made.append(path)
    lines = parallel_coordinates(result)
    if lines is not None:
        made.append(folder / "sweep-parallel-coordinates.html")
        made[-1].write_text(lines, "utf-8")
    return made
