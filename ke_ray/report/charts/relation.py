"""All measures of the starts against what learning made of them, in one map."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ke_ray.errors import ResultsError
from ke_ray.report import series
from ke_ray.report.charts.figure import Figure, Panel, figure_of
from ke_ray.report.charts.plot import X, heat_map
from ke_ray.report.relation import KINDS, OUTCOMES, is_same_series, relate
from ke_ray.report.sources import Result
from ke_ray.report.weight_values import WEIGHT_VALUES


def relation_figures(results: Sequence[Result]) -> list[Figure]:
    """A figure per scan from whose checkpoints enough continual studies of these start."""
    studies = [result for result in results if result.kind == "continual"]
    figures: list[Figure] = []
    for scan in (result for result in results if result.kind == "scan"):
        try:
            table = relate(scan, [study for study in studies if is_same_series(scan, study)])
        except ResultsError:
            continue  # nothing to relate: the command says why
        number = f"-{len(figures) + 1}" if figures else ""
        figures.append(relation_figure(scan, table, f"relation{number}"))
    return figures


def relation_figure(scan: Result, table: pd.DataFrame, name: str = "relation") -> Figure:
    """A row per measure and, per outcome, a column as it is and one with step and loss fixed."""
    held = str(table["fixed"].max())
    table = table.assign(
        title=[_title(scan, measure) for measure in table["measure"]],
        short=table["outcome"].map(OUTCOMES)
        + table["fixed"].map(lambda fixed: "*" if fixed else ""),
        mark="line",
    )
    columns = {
        "num_starts": "starts",
        "low": "low (95 %)",
        "high": "high (95 %)",
        "p": "p",
        "p_holm": "p (Holm)",
    }
    order = [short + star for short in OUTCOMES.values() for star in ("", "*")]
    panels = []
    for kind in KINDS:
        own = table[(table["kind"] == kind) & table["r"].notna()]
        own = own.sort_values(
            "short", key=lambda column: column.map(order.index), kind="stable", ignore_index=True
        )
        if len(own):
            plot = heat_map(
                own,
                X("short", "outcome"),
                X("title", "measure of the start"),
                "r",
                value="r",
                diverging=True,
                write_values=True,
                ends=(-1.0, 1.0),
                columns=columns,
            )
            panels.append(Panel((kind.capitalize(),), plot))
    most, num_series = int(table["num_starts"].max()), int(table["num_series"].max())
    tests = int(table["p"].notna().groupby([table["kind"], table["fixed"]]).sum().max())
    return figure_of(
        scan,
        "comparison",
        name,
        title="Which measure of a start goes with what it learns?",
        caption=f"Correlation over up to {most} starts of {num_series} series, each with an "
        f"intercept of its own. * holds {held} fixed, since everything trends with training. "
        "A: acquisition, F: forgetting, ΔK and ΔP: what became of knowledge of the injected facts "
        f"and of zero-shot accuracy. Up to {tests} "
        "correlations of a kind: p (Holm) is adjusted for that.",
        panels=panels,
        controls=("correlation",),
        wide=True,
    )


def _title(scan: Result, measure: str) -> str:
    own = WEIGHT_VALUES.get(measure)
    return own[2] if own else series.declared(scan, measure)[0]
