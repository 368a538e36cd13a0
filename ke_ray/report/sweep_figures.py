"""Figures of a sweep: Table 1, factor curve, ratio × factor map, Pareto front, parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from ke_ray.report import paper, runs
from ke_ray.report.charts import Chart, Figure, HeatMap, Line, Mark, Panel, TextTable
from ke_ray.report.scales import number
from ke_ray.report.sources import Result

__all__ = ["sweep_figures"]

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


def sweep_figures(study: Result, prefix: str) -> tuple[list[Figure], list[str]]:
    """(figures that the files can fill, what is missing and why)."""
    frame = runs.good_runs(study)
    if frame.empty:
        return [], ["No trial has finished yet."]
    frame = _own_originals(frame.assign(control=frame["control"].map(_control)))
    missing: list[str] = []
    figures = [
        *_table_1(study, prefix, frame, missing),
        *_factor_curve(study, prefix, frame, missing),
        *_map(study, prefix, frame, missing),
        *_front(study, prefix, frame, missing),
        *_parameters(study, prefix, frame),
    ]
    return figures, missing


def _own_originals(frame: pd.DataFrame) -> pd.DataFrame:
    """Give trials of an unchanged start their A and F against it: it is its own original."""
    unchanged = frame["variant"] == "original"
    for name in ("acquisition", "forgetting"):
        for end in ("", "_low", "_high"):
            against, plain = f"{name}_vs_original{end}", f"{name}{end}"
            if against in frame and plain in frame:
                own = frame[plain].where(unchanged)
                frame = frame.assign(**{against: frame[against].fillna(own)})
    return frame


def _control(value: Any) -> str:
    return value if isinstance(value, str) and value != "none" else ""


def _figure(study: Result, prefix: str, name: str, **parts: object) -> Figure:
    return Figure(
        id=f"{prefix}-{name}",
        command=study.command,
        source=study.path,
        fingerprints=study.fingerprints,
        **parts,  # type: ignore[arg-type]
    )


def _starts(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Trials by starting checkpoint: stages are never averaged together."""
    return [(str(name), part) for name, part in frame.groupby("checkpoint", sort=False)]


def _table_1(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    """A and F by starting step and setting beside the published ones."""
    settings, reason = paper.repeated(study, frame)
    frame = frame.assign(setting=settings)[settings.notna()]
    if frame.empty:
        missing.append(f"The paper's Table 1 is not laid over A and F: {reason}.")
        return []
    panels = []
    cells: dict[tuple[str, int], list[str]] = {}
    for column in ("acquisition", "forgetting"):
        title, unit, factor = runs.RUN_COLUMNS[column]
        lines: list[Line] = []
        for colour, (setting, published) in enumerate(paper.TABLE_1.items()):
            part = frame[frame["setting"] == setting]
            mean = runs.aggregate(part, ["step"], column)
            values = getattr(published, column)
            if mean.empty:
                continue
            y, low, high = (mean[end].to_numpy() * factor for end in ("value", "low", "high"))
            x = mean["step"].to_numpy()
            lines.append(Line(setting, x, y, low, high, colour=colour, band=False))
            lines.append(Line(f"{setting}, paper", paper.STEPS, values, colour=colour, dash=1))
            for step, own, least, most in zip(x, y, low, high, strict=True):
                interval = f" [{least:.1f}, {most:.1f}]" if math.isfinite(least + most) else ""
                stage = paper.nearest_stage(step)
                row = cells.setdefault((setting, int(step)), [setting, number(step)])
                row += [f"{own:.1f}{interval}", str(values[stage]) if stage is not None else "–"]
        if lines:
            axis = f"{title} ({unit})"
            panels.append(Panel((title,), Chart("pretraining step of the start", axis, lines)))
    heads = ["setting", "step"]
    heads += [f"{name} %{by}" for name in ("A", "F") for by in (" [95 %]", ", paper")]
    full = [row for row in cells.values() if len(row) == len(heads)]
    if full:
        panels.append(Panel(("table",), TextTable(heads, full)))
    return (
        [
            _figure(
                study,
                prefix,
                "table-1",
                title="Table 1 of the paper, repeated",
                caption="Solid: these trials, with 95 % Student intervals over seeds or a single "
                "trial's bootstrap interval; dashed: as published. " + paper.TREND_ONLY,
                paper="Table 1",
                panels=panels,
                controls=("shown",),
                wide=True,
            )
        ]
        if panels
        else []
    )


def _factor_curve(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    panels = []
    for start, part in _starts(frame):
        for column in _SHOWN:
            chart = _curve(part, column)
            if chart is not None:
                panels.append(Panel((runs.RUN_COLUMNS[column][0], start), chart))
    if not panels:
        missing.append("Factor curve: no finished trial has an amplifying factor.")
        return []
    return [
        _figure(
            study,
            prefix,
            "factor-curve",
            title="Over the amplifying factor q",
            caption=_curve_caption(study, frame),
            paper="Fig. 5, 15–17",
            panels=panels,
            controls=("shown", "start"),
        )
    ]


def _curve_caption(study: Result, frame: pd.DataFrame) -> str:
    text = "One line per resuscitation ratio p"
    if (frame["control"] != "").any():
        text += "; controls are separate points at their own p and q"
    if (frame["variant"] == "original").any():
        text += "; dotted line: the original, unchanged checkpoint"
    over = " and over ".join(["seeds", *runs.other_parameters(study)])
    return (
        f"{text}. Means over {over}. Bars: 95 % Student interval over these trials, or a single "
        "trial's bootstrap interval, where there is one."
    )


def _curve(part: pd.DataFrame, column: str) -> Chart | None:
    title, unit, factor = runs.RUN_COLUMNS[column]
    if column not in part:
        return None
    swept = part[part["amplifying_factor"].notna() & part[column].notna()]
    if swept.empty:
        return None
    lines: list[Line] = []
    groups = swept.groupby(["control", "resuscitation_ratio"], dropna=False, sort=True)
    for place, ((control, ratio), group) in enumerate(groups):
        mean = runs.aggregate(group, ["amplifying_factor"], column)
        named = [control] if control else []
        name = ", ".join([*named, f"p = {ratio:g}"] if math.isfinite(ratio) else named or ["no p"])
        lines.append(
            Line(
                name,
                mean["amplifying_factor"].to_numpy(),
                mean["value"].to_numpy() * factor,
                mean["low"].to_numpy() * factor,
                mean["high"].to_numpy() * factor,
                colour=place,
                kind="points" if control else "line",
                band=False,
            )
        )
    lines.sort(key=lambda line: line.kind)
    original = part[part["variant"] == "original"][column].dropna()
    marks = [Mark("y", float(original.mean()) * factor, "original")] if len(original) else []
    return Chart("amplifying factor q", f"{title} ({unit})" if unit else title, lines, marks)


def _map(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    panels = []
    for start, part in _starts(frame):
        plain = part[(part["control"] == "") & part["amplifying_factor"].notna()]
        ratios = np.sort(plain["resuscitation_ratio"].dropna().unique())
        factors = np.sort(plain["amplifying_factor"].dropna().unique())
        if len(ratios) < 2 or len(factors) < 2:
            continue
        for column in _SHOWN:
            title, unit, factor = runs.RUN_COLUMNS[column]
            if column not in plain or plain[column].notna().sum() == 0:
                continue
            pivot = plain.pivot_table(
                index="resuscitation_ratio", columns="amplifying_factor", values=column
            )
            values = pivot.reindex(index=ratios, columns=factors).to_numpy(dtype=float) * factor
            panels.append(
                Panel(
                    (title, start),
                    HeatMap(
                        "amplifying factor q",
                        "resuscitation ratio p",
                        unit,
                        values,
                        [f"{v:g}" for v in factors],
                        [f"{v:g}" for v in ratios],
                        write_values=True,
                    ),
                )
            )
    if not panels:
        missing.append(
            "Ratio × factor map: needs at least two ratios and two factors of one start."
        )
        return []
    return [
        _figure(
            study,
            prefix,
            "ratio-factor",
            title="Resuscitation ratio × amplifying factor",
            caption=f"Mean over {' and over '.join(['seeds', *runs.other_parameters(study)])}; "
            "controls are not in the map.",
            paper="B.6",
            panels=panels,
            controls=("shown", "start"),
        )
    ]


def _front(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    both = frame[frame["acquisition"].notna() & frame["forgetting"].notna()]
    if len(both) < 2:
        missing.append("Pareto front: needs two or more trials with both A and F.")
        return []
    names = runs.setting_names(study, both)
    if both["checkpoint"].nunique() > 1:
        names = [
            f"{name} from {start}" for name, start in zip(names, both["checkpoint"], strict=True)
        ]
    a, f = (
        both.assign(setting=names).groupby("setting", sort=False)[column].mean() * 100
        for column in ("acquisition", "forgetting")
    )
    best = runs.pareto_front(a.to_numpy(), f.to_numpy())
    order = np.argsort(f.to_numpy()[best])
    lines = [
        Line(
            "Pareto front",
            f.to_numpy()[best][order],
            a.to_numpy()[best][order],
            colour=1,
            labels=a.index[best][order].to_list(),
        ),
        Line(
            "other settings",
            f.to_numpy()[~best],
            a.to_numpy()[~best],
            colour=0,
            kind="points",
            labels=a.index[~best].to_list(),
        ),
    ]
    return [
        _figure(
            study,
            prefix,
            "pareto",
            title="Acquisition against forgetting",
            caption="One point per setting (mean over seeds). On the front are the settings that "
            "no other beats in A or F without losing in the other: "
            + "; ".join(a.index[best])
            + ". Differences within the error of A and F are not told apart here."
            + (
                " A and F are against each trial's own start, which resuscitation has changed."
                if (both["variant"] != "original").any()
                else ""
            ),
            panels=[Panel((), Chart("Forgetting F (%)", "Acquisition A (%)", lines))],
        )
    ]


def _parameters(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    panels = []
    for name in runs.swept_parameters(study):
        if name not in frame:
            continue
        values = pd.to_numeric(frame[name], errors="coerce")
        numeric = bool(values.notna().any())
        texts = frame[name].map(lambda value: "none" if pd.isna(value) else str(value))
        names = None if numeric else list(dict.fromkeys(texts))
        x = values if numeric else texts.map({t: float(i) for i, t in enumerate(names or [])})
        for column in ("acquisition", "forgetting"):
            title, unit, factor = runs.RUN_COLUMNS[column]
            keep = x.notna() & frame[column].notna()
            if not keep.any():
                continue
            line = Line(
                "trials",
                x[keep].to_numpy(dtype=float),
                frame.loc[keep, column].to_numpy(dtype=float) * factor,
                kind="points",
                labels=frame.loc[keep, "trial_id"].astype(str).to_list(),
            )
            panels.append(
                Panel((name, title), Chart(name, f"{title} ({unit})", [line], x_names=names))
            )
    if not panels:
        return []
    return [
        _figure(
            study,
            prefix,
            "parameters",
            title="A and F over each swept parameter",
            caption="One point a trial; other parameters vary along.",
            panels=panels,
            controls=("parameter", "shown"),
        )
    ]
