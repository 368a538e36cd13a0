"""Figures of the dynamics of injected knowledge (Chang et al. 2024): effectivity, retainability."""

from __future__ import annotations

import pandas as pd

from ke_ray.report.charts.figure import Figure, Panel, figure_of
from ke_ray.report.charts.plot import Rule, X, series_plot
from ke_ray.report.sources import Result

_SETTINGS = ("paraphrase", "once")


def dynamics_figures(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    """What each injection adds, and how much of it stays; names what is missing in ``missing``."""
    figures: list[Figure] = []
    gained = _panels(
        study.table("dynamics"),
        frame,
        X("step", "training step of the injection"),
        ("effectivity", "effectivity (nats per target token)"),
    )
    if gained:
        figures.append(
            figure_of(
                study,
                prefix,
                "effectivity",
                title="What each injection adds",
                caption="Effectivity: rise of the log probability from the injection to its local "
                "maximum. Bars: 95 % interval over paragraphs (Hall's), where it is recorded.",
                panels=gained,
                controls=("run", "probes"),
            )
        )
    else:
        missing.append("Effectivity of injections: none recorded (needs probes between them).")
    kept = _panels(
        study.table("retainability"),
        frame,
        X("lag", "training steps after the local maximum"),
        ("retainability", "retainability (share of the rise)"),
    )
    if kept:
        figures.append(
            figure_of(
                study,
                prefix,
                "retainability",
                title="How much of it stays",
                caption="Retainability: share of the rise that is left before the next injection, "
                "mean over the injections after which the log probability rose.",
                panels=kept,
                controls=("run", "probes"),
            )
        )
    else:
        missing.append(
            "Retainability: none recorded (needs two or more probes between injections, and a rise "
            "after one of them)."
        )
    return figures


def _panels(
    table: pd.DataFrame, frame: pd.DataFrame, x: X, measure: tuple[str, str]
) -> list[Panel]:
    """One panel per run and level of probes, one line per setting: means over injections."""
    column, axis = measure
    if not {x.field, column, "run", "setting", "level"} <= set(table.columns):
        return []
    names = {column: "value", f"{column}_low": "low", f"{column}_high": "high"}
    table = table.rename(columns=names)
    table = table[table["run"].isin(frame["run"]) & table["setting"].isin(_SETTINGS)]
    values = [name for name in names.values() if name in table]
    means = table[table["value"].notna()].groupby(["run", "level", "setting", x.field])[values]
    rows = means.mean().reset_index().rename(columns={"setting": "series"})
    rows = rows.sort_values("series", ascending=False, kind="stable")  # paraphrase before once
    panels = []
    for run in frame["run"]:
        own = rows[rows["run"] == run]
        for level in sorted(own["level"].unique(), key=lambda name: (name != "all", name)):
            part = own.loc[own["level"] == level, ["series", x.field, *values]]
            plot = series_plot(part, x, axis, bars=True, rules=[Rule("y", 0.0)])
            panels.append(Panel((str(run), str(level)), plot))
    return panels
