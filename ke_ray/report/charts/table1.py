"""Tables 1 and 2 of the paper beside a sweep that repeats them: cell by cell, and by trend."""

from __future__ import annotations

import math

import pandas as pd

from ke_ray.report import paper, runs
from ke_ray.report.charts.figure import Figure, Panel, TextTable, figure_of, number
from ke_ray.report.charts.plot import X, series_plot
from ke_ray.report.charts.stages import published_rows
from ke_ray.report.sources import Result

# Column -> (its letter and unit, digits).
_SHOWN = {
    "acquisition": ("A %", 1),
    "forgetting": ("F %", 1),
    "probe_logprob_after": ("K after", 3),
    "downstream_after": ("P after %", 1),
}
_COMPARED = ("acquisition", "forgetting")  # by value; K depends on batching, P on prompts
_ROUNDING = 0.05  # of a printed per cent


def table_1_figures(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    """A, F, K and P by starting step and setting beside the published ones."""
    settings, reason = paper.repeated(study, frame)
    frame = frame.assign(setting=settings)[settings.notna()]
    if frame.empty:
        missing.append(f"The paper's Table 1 is not laid over A and F: {reason}.")
        return []
    panels = []
    cells: dict[str, pd.DataFrame] = {}
    names = [name for name in paper.TABLE_1 if (frame["setting"] == name).any()]
    for column in _SHOWN:
        own = runs.aggregate(frame, ["setting", "step"], column).rename(columns={"step": "x"})
        if own.empty:
            continue
        own["setting"] = pd.Categorical(own["setting"], names)
        own = own.sort_values(["setting", "x"]).astype({"setting": str})
        cells[column] = own.assign(published=[_published(row, column) for row in _rows(own)])
        if column in _COMPARED:
            panels.append(_curves(own, names, column))
    agreement = ""
    if set(_COMPARED) <= set(cells):
        panels.append(Panel(("table",), _beside_the_paper(cells)))
        agreement = _agreement(cells)
    trends = _trends(cells, names)
    if trends.rows:
        panels.append(Panel(("trend over stages",), trends))
    return [
        figure_of(
            study,
            prefix,
            "table-1",
            title="Tables 1 and 2 of the paper, repeated",
            caption=f"{agreement}Solid: these trials, with 95 % Student intervals over seeds or a "
            f"single trial's bootstrap interval; dashed: as published. {paper.TREND_ONLY} K and P "
            "of other settings than the baseline are implied by their A and F.",
            paper="Table 1, Table 2",
            panels=panels,
            controls=("shown",),
            wide=True,
        )
    ]


def _curves(own: pd.DataFrame, names: list[str], column: str) -> Panel:
    title, unit, _ = runs.RUN_COLUMNS[column]
    parts = (own.assign(source="these trials"), published_rows(names, column))
    rows = pd.concat(parts, ignore_index=True).fillna({"source": "the paper"})
    rows["setting"] = pd.Categorical(rows["setting"], names)
    rows = rows.sort_values(["setting", "source"], ascending=[True, False])
    rows["setting"] = rows["setting"].astype(str)
    x = X("x", "pretraining step of the start")
    y_title = f"{title} ({unit})"
    plot = series_plot(rows, x, y_title, colour="setting", dash="source", bars=True)
    return Panel((title,), plot)


def _rows(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _published(row: dict[str, object], column: str) -> float:
    stage = paper.nearest_stage(float(str(row["x"])))
    assert stage is not None, "runs at other steps repeat no row"
    return paper.published(str(row["setting"]), column)[stage]


def _agrees(row: pd.Series) -> str:
    """Whether the published value lies in our interval, its rounding allowed for."""
    if not math.isfinite(row["low"] + row["high"]):
        return "–"
    inside = row["low"] - _ROUNDING <= row["published"] <= row["high"] + _ROUNDING
    return "yes" if inside else "no"


def _beside_the_paper(cells: dict[str, pd.DataFrame]) -> TextTable:
    tables = {column: table.set_index(["setting", "x"]) for column, table in cells.items()}
    heads = ["setting", "step"]
    for column in tables:
        name, _ = _SHOWN[column]
        heads += [f"{name} [95 %]", f"{name}, paper"]
        heads += ["agrees"] if column in _COMPARED else []
    lines = []
    for setting, step in tables["acquisition"].index:
        line = [setting, number(step)]
        for column, table in tables.items():
            digits = _SHOWN[column][1]
            if (setting, step) not in table.index:
                line += ["–"] * (3 if column in _COMPARED else 2)
                continue
            row = table.loc[(setting, step)]
            value, low, high, published = (
                f"{row[name]:.{digits}f}".replace("-", "−")
                for name in ("value", "low", "high", "published")
            )
            known = math.isfinite(row["low"] + row["high"])
            line += [f"{value} [{low}, {high}]" if known else value, published]
            line += [_agrees(row)] if column in _COMPARED else []
        lines.append(line)
    return TextTable(heads, lines)


def _agreement(cells: dict[str, pd.DataFrame]) -> str:
    """A sentence: in how many cells our interval holds the published value."""
    parts = []
    for column in _COMPARED:
        answers = cells[column].apply(_agrees, axis=1)
        judged = answers[answers != "–"]
        name = _SHOWN[column][0].split()[0]
        if len(judged):
            parts.append(f"{name} agrees in {(judged == 'yes').sum()} of {len(judged)} cells")
    if not parts:
        return "No cell has an interval, so none is said to agree. "
    return f"{' and '.join(parts)} (the published value lies in the interval). "


def _trends(cells: dict[str, pd.DataFrame], names: list[str]) -> TextTable:
    """First to last stage of each setting, ours and the paper's, and their rank correlation."""
    lines = []
    for name in names:
        for column, table in cells.items():
            own = table[table["setting"] == name]
            if len(own) < 2:
                continue
            letter, digits = _SHOWN[column]
            ours, theirs = (own[key].iloc[-1] - own[key].iloc[0] for key in ("value", "published"))
            ranks = own["value"].rank().corr(own["published"].rank())
            line = [name, letter, str(len(own))]
            line += [f"{change:+.{digits}f}".replace("-", "−") for change in (ours, theirs)]
            line.append("yes" if ours * theirs > 0 else "no")
            line.append(f"{ranks:+.2f}".replace("-", "−") if math.isfinite(ranks) else "–")
            lines.append(line)
    heads = ["setting", "", "stages", "first to last", "paper's", "same direction"]
    return TextTable([*heads, "rank correlation"], lines)
