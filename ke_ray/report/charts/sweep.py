"""Figures of a sweep: stages, factor curve, ratio × factor map, Pareto front, parameters."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ke_ray.report import runs
from ke_ray.report.charts.figure import Chart, Figure, Panel, Plot, figure_of
from ke_ray.report.charts.plot import Rule, X, heat_map, layered, series_plot
from ke_ray.report.charts.stages import before_after_figures, stage_figures
from ke_ray.report.charts.table1 import table_1_figures
from ke_ray.report.sources import Result

_SHOWN = (
    "acquisition",
    "forgetting",
    "acquisition_vs_original",
    "forgetting_vs_original",
    "probe_logprob_after",
    "downstream_after",
    "knowledge_entropy_before_nats",
    "knowledge_entropy_after_nats",
)
_PARALLEL = ("acquisition", "forgetting", "knowledge_entropy_before_nats", "probe_logprob_after")


def sweep_figures(study: Result, prefix: str) -> tuple[list[Figure], list[str]]:
    """(figures that the files can fill, what is missing and why)."""
    frame = runs.good_runs(study)
    if frame.empty:
        return [], ["No trial has finished yet."]
    frame = _own_originals(frame.assign(control=frame["control"].map(_control)))
    missing: list[str] = []
    figures = [
        *table_1_figures(study, prefix, frame, missing),
        *_stages(study, prefix, frame, missing),
        *_factor_curve(study, prefix, frame, missing),
        *_map(study, prefix, frame, missing),
        *_front(study, prefix, missing),
        *_parameters(study, prefix, frame),
        *_parallel(study, prefix, frame),
    ]
    return figures, missing


def _stages(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    """What continual studies show by stage, where the trials start from several checkpoints."""
    if frame["checkpoint"].nunique() < 2:
        return []
    return [
        *stage_figures(study, prefix, frame, missing),
        *([] if runs.other_parameters(study) else before_after_figures(study, prefix, frame, [])),
    ]


def _own_originals(frame: pd.DataFrame) -> pd.DataFrame:
    """Give trials of an unchanged start their A and F against it: it is its own original."""
    unchanged = frame["variant"] == "original"
    for name in ("acquisition", "forgetting"):
        for end in ("", "_low", "_high"):
            against, plain = f"{name}_vs_original{end}", f"{name}{end}"
            changed = frame.loc[~unchanged, against]
            if changed.empty or changed.notna().any():
                own = frame[plain].where(unchanged)
                frame = frame.assign(**{against: frame[against].fillna(own)})
    return frame


def _control(value: Any) -> str:
    return value if isinstance(value, str) and value != "none" else ""


def _titled(column: str) -> tuple[str, str]:
    """(title, title of an axis with the unit) of a column of trials."""
    title, unit, _ = runs.RUN_COLUMNS.get(column, (column, "", 1.0))
    return title, f"{title} ({unit})" if unit else title


def _starts(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Trials by starting checkpoint: stages are never averaged together."""
    return [(str(name), part) for name, part in frame.groupby("checkpoint", sort=False)]


def _factor_curve(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    panels = []
    for start, part in _starts(frame):
        for column in _SHOWN:
            plot = _curve(part, column)
            if plot is not None:
                panels.append(Panel((_titled(column)[0], start), plot))
    if not panels:
        missing.append("Factor curve: no finished trial has an amplifying factor.")
        return []
    text = "One line per resuscitation ratio p"
    if (frame["control"] != "").any():
        text += "; controls are separate points at their own p and q"
    if (frame["variant"] == "original").any():
        text += "; dotted line: the original, unchanged checkpoint"
    return [
        figure_of(
            study,
            prefix,
            "factor-curve",
            title="Over the amplifying factor q",
            caption=f"{text}. Means over {_averaged(study)}. Bars: 95 % Student interval over "
            "these trials, or a single trial's bootstrap interval, where there is one.",
            paper="Fig. 5, 15–17",
            panels=panels,
            controls=("shown", "start"),
        )
    ]


def _averaged(study: Result) -> str:
    """What a mean over the trials of one (p, q) goes over."""
    return " and over ".join(["seeds", *runs.other_parameters(study)])


def _curve(part: pd.DataFrame, column: str) -> Plot | None:
    if column not in part:
        return None
    swept = part[part["amplifying_factor"].notna() & part[column].notna()]
    if swept.empty:
        return None
    by = ["control", "resuscitation_ratio", "amplifying_factor"]
    rows = runs.aggregate(swept, by, column)
    names = rows["resuscitation_ratio"].map(lambda p: f"p = {p:g}" if math.isfinite(p) else "no p")
    rows["series"] = (rows["control"] + ", ").where(rows["control"] != "", "") + names
    rows["mark"] = np.where(rows["control"] == "", "line", "point")
    original = runs.in_unit(part[part["variant"] == "original"], column).dropna()
    rules = [Rule("y", float(original.mean()), "original")] if len(original) else []
    x = X("amplifying_factor", "amplifying factor q")
    return series_plot(rows, x, _titled(column)[1], bars=True, rules=rules)


def _map(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    panels = []
    for start, part in _starts(frame):
        plain = part[(part["control"] == "") & part["amplifying_factor"].notna()]
        by = ["resuscitation_ratio", "amplifying_factor"]
        if plain[by].nunique().min() < 2:
            continue
        for column in _SHOWN:
            rows = runs.aggregate(plain, by, column)
            if rows.empty:
                continue
            title, unit, _ = runs.RUN_COLUMNS[column]
            rows = rows.assign(**{name: rows[name].map("{:g}".format) for name in by})
            plot = heat_map(
                rows,
                X("amplifying_factor", "amplifying factor q"),
                X("resuscitation_ratio", "resuscitation ratio p"),
                unit,
                write_values=True,
                columns={"count": "trials"},
            )
            panels.append(Panel((title, start), plot))
    if not panels:
        missing.append(
            "Ratio × factor map: needs at least two ratios and two factors of one start."
        )
        return []
    return [
        figure_of(
            study,
            prefix,
            "ratio-factor",
            title="Resuscitation ratio × amplifying factor",
            caption=f"Mean over {_averaged(study)}; controls are not in the map.",
            paper="B.6",
            panels=panels,
            controls=("shown", "start"),
        )
    ]


def _front(study: Result, prefix: str, missing: list[str]) -> list[Figure]:
    """The settings in each pair of objectives; the front is the sweep's own (all objectives)."""
    table = study.table("settings")
    table = table[table["value"].notna()] if "value" in table else table
    metrics = list(dict.fromkeys(table["metric"])) if len(table) else []
    if len(metrics) < 2:
        missing.append(
            "Pareto front: needs a settings.parquet with two or more objectives, it has "
            f"{len(metrics)}."
        )
        return []
    names = table.drop_duplicates("point").set_index("point")["params"].map(_setting_name)
    front = table[table["on_front"]]["point"].drop_duplicates()
    panels = []
    for one, other in itertools.combinations(metrics, 2):
        points = [_objective(table, metric) for metric in (one, other)]
        rows = points[0].join(points[1]["value"].rename("other"), how="inner").reset_index()
        on_front = rows["point"].isin(front)
        rows = rows.assign(
            setting=rows["point"].map(names),
            series=np.where(on_front, "Pareto front", "other settings"),
            mark=np.where(on_front, "line", "point"),
        ).sort_values("other")
        rows = rows.sort_values("series", ascending=False, kind="stable")
        plot = series_plot(
            rows,
            X("other", _titled(other)[1]),
            _titled(one)[1],
            columns={"setting": "setting"},
            bars=True,
        )
        panels.append(Panel((f"{_titled(one)[0]} against {_titled(other)[0]}",), plot))
    several = "" if len(metrics) == 2 else f" The front is that of all {len(metrics)} objectives."
    return [
        figure_of(
            study,
            prefix,
            "pareto",
            title="Settings and their Pareto front",
            caption="One point per setting: mean over seeds, bars: its 95 % interval. On the front "
            "are the settings that no other beats in one objective without losing in another: "
            + "; ".join(names[point] for point in front)
            + f".{several} Differences within the errors are not told apart here.",
            panels=panels,
            controls=("objectives",),
        )
    ]


def _objective(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """[value, low, high] of an objective by point, in the unit of display."""
    factor = runs.RUN_COLUMNS.get(metric, ("", "", 1.0))[2]
    own = table[table["metric"] == metric].set_index("point")
    return own[["value", "low", "high"]] * factor


def _setting_name(params: str) -> str:
    """``ratio=0.5 factor=2`` for the JSON text of a setting's parameters."""
    values = {key: value for key, value in json.loads(params).items() if value is not None}
    texts = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())
    return " ".join(texts) or "original"


def _parameters(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    panels = []
    for name in runs.swept_parameters(study):
        if name not in frame:
            continue
        numbers = pd.to_numeric(frame[name], errors="coerce")
        numeric = bool(numbers.notna().any())
        values = numbers if numeric else frame[name].map(_text)
        for column in ("acquisition", "forgetting"):
            rows = frame[["trial_id"]].assign(
                parameter=values, value=runs.in_unit(frame, column), series="trials", mark="point"
            )
            rows = rows.dropna(subset=["parameter", "value"])
            if rows.empty:
                continue
            x = X("parameter", name, names=not numeric)
            title, axis = _titled(column)
            plot = series_plot(rows, x, axis, columns={"trial_id": "trial"})
            panels.append(Panel((name, title), plot))
    if not panels:
        return []
    return [
        figure_of(
            study,
            prefix,
            "parameters",
            title="A and F over each swept parameter",
            caption="One point per trial; other parameters vary along.",
            panels=panels,
            controls=("parameter", "shown"),
        )
    ]


def _text(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)


def _parallel(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    """Parallel coordinates: one line per trial through its parameters and its results."""
    names = [name for name in runs.swept_parameters(study) if name in frame]
    if len(frame) < 2 or not names:
        return []
    parts = []
    for name in names:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        texts = frame[name].map(_text)
        if numbers.isna().any():
            numbers = texts.map({text: i for i, text in enumerate(sorted(texts.unique()))})
        parts.append(_coordinate(frame, name, numbers, texts))
    for column in _PARALLEL:
        if column in frame and frame[column].notna().any():
            shown = runs.in_unit(frame, column)
            parts.append(_coordinate(frame, _titled(column)[0], shown, shown.map("{:.5g}".format)))
    rows = pd.concat(parts, ignore_index=True)
    columns = {"trial_id": "trial", "axis": "axis", "shown": "value"}
    if frame["acquisition"].notna().any():
        a = dict(zip(frame["trial_id"], runs.in_unit(frame, "acquisition"), strict=True))
        rows = rows.assign(a=rows["trial_id"].map(a))
        columns["a"] = "A (%)"
    return [
        figure_of(
            study,
            prefix,
            "parallel-coordinates",
            title="Every trial through its parameters and results",
            caption="One line per trial; every axis runs from its smallest value to its largest. "
            "Pointing at a line brings it out; Shift and a click keep several.",
            panels=[Panel((), Plot(_parallel_chart(rows, columns), rows, columns))],
            wide=True,
        )
    ]


def _coordinate(
    frame: pd.DataFrame, axis: str, values: pd.Series, texts: pd.Series
) -> pd.DataFrame:
    span = values.max() - values.min()
    share = (values - values.min()) / span if span > 0 else values * 0 + 0.5
    return pd.DataFrame(
        {"trial_id": frame["trial_id"], "axis": axis, "value": share, "shown": texts}
    )


def _parallel_chart(rows: pd.DataFrame, columns: dict[str, str]) -> Chart:
    over = alt.selection_point("over", fields=["trial_id"], on="pointermove", empty=False)
    kept = alt.selection_point("kept", fields=["trial_id"], empty=False)
    chosen = over | kept
    axis = alt.Axis(labelAngle=-35, labelOverlap=False, grid=True)
    base = alt.Chart().encode(
        x=alt.X("axis:N", sort=None, title=None, axis=axis),
        y=alt.Y("value:Q", axis=None),
        detail="trial_id:N",
        tooltip=[alt.Tooltip(f"{name}:N", title=title) for name, title in columns.items()],
    )
    if "a" in rows:
        base = base.encode(
            color=alt.Color("a:Q", title="A (%)", legend=alt.Legend(type="gradient"))
        )
    line = base.mark_line().encode(
        opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.35)),
        strokeWidth=alt.when(chosen).then(alt.value(4)).otherwise(alt.value(1.5)),
    )
    point = base.mark_point(filled=False, size=25)
    return layered(line.add_params(over, kept), point, height=300)
