"""Figures of continual learning: A and F by stage, probes over training, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from ke_ray.report import paper, runs
from ke_ray.report.axis import TITLES
from ke_ray.report.charts.dynamics import dynamics_figures
from ke_ray.report.charts.figure import Figure, Panel, figure_of
from ke_ray.report.charts.plot import Rule, X, series_plot
from ke_ray.report.correlation import correlate, p_value
from ke_ray.report.sources import Result

_LEVELS = ("memorization", "semantic", "compositional")
_SETTINGS = ("paraphrase", "once")
_MOST_STEPS = 400  # of a run whose loss is drawn


def continual_figures(study: Result, prefix: str) -> tuple[list[Figure], list[str]]:
    """(figures that the files can fill, what is missing and why)."""
    frame = runs.good_runs(study)
    if frame.empty:
        return [], ["No run has finished yet."]
    missing: list[str] = []
    figures = [
        *_by_stage(study, prefix, frame, missing),
        *_correlation(study, prefix, frame, missing),
        *_probes(study, prefix, frame, missing),
        *_before_after(study, prefix, frame, missing),
        *_tasks(study, prefix, frame),
        *_training(study, prefix, frame, missing),
        *dynamics_figures(study, prefix, frame, missing),
    ]
    return figures, missing


def _start_axis(frame: pd.DataFrame) -> X:
    unit = str(frame["unit"].iloc[0])
    named = f"{TITLES[unit]} of the start"
    return X("x", "start (place in the list)" if unit == "place" else named)


def published_rows(settings: Sequence[str], column: str) -> pd.DataFrame:
    """A or F of Table 1 in %: [setting, x, value]."""
    parts = [
        pd.DataFrame(
            {"setting": name, "x": paper.STEPS, "value": getattr(paper.TABLE_1[name], column)}
        )
        for name in settings
    ]
    return pd.concat(parts) if parts else pd.DataFrame(columns=["setting", "x", "value"])


def _by_stage(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    settings, reason = paper.repeated(study, frame)
    repeated = list(settings.dropna().unique())
    figures = []
    for column in ("acquisition", "forgetting"):
        title, unit, _ = runs.RUN_COLUMNS[column]
        mean = runs.aggregate(frame, ["x", "variant"], column)
        if mean.empty:
            missing.append(f"{title}: no run holds it.")
            continue
        parts = [mean.assign(series=_named(mean, "mean of runs"), mark="line", of="these runs")]
        single = frame[frame[column].notna()]
        if len(single) > len(mean):
            dots = single[["x", "variant", "run"]].assign(value=runs.in_unit(single, column))
            parts.append(dots.assign(series=_named(dots, "single runs"), mark="dot"))
        published = published_rows(repeated, column)
        if len(published):
            names = "paper, Table 1 (" + published["setting"] + ")"
            parts.append(published.assign(series=names, mark="line"))
        plot = series_plot(
            pd.concat(parts, ignore_index=True),
            _start_axis(frame),
            f"{title} ({unit})",
            columns={"run": "run"} if len(parts) > 1 and "run" in parts[1] else {},
            bars=True,
        )
        figures.append(
            figure_of(
                study,
                prefix,
                column,
                title=f"{title} by starting stage",
                caption="Interval: 95 % Student interval over seeds where a start has several "
                "runs, else the run's own 95 % bootstrap interval where it has one."
                + (f" {paper.TREND_ONLY}" if repeated and column == "acquisition" else ""),
                paper="Fig. 4",
                panels=[Panel((), plot)],
            )
        )
    if not repeated:
        missing.append(f"The paper's Table 1 is not laid over A and F: {reason}.")
    return figures


def _named(rows: pd.DataFrame, what: str) -> pd.Series:
    """``what`` for the unchanged start, else the variant (and ``what``, of single runs)."""
    suffix = f", {what}" if what == "single runs" else ""
    return (rows["variant"] + suffix).where(rows["variant"] != "original", what)


def _correlation(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    entropy = "knowledge_entropy_before_nats"
    base = frame[frame["variant"] == "original"]
    start = runs.aggregate(base, ["checkpoint"], entropy)[["checkpoint", "value"]]
    figures = []
    for column in ("acquisition", "forgetting"):
        title, unit, _ = runs.RUN_COLUMNS[column]
        mean = runs.aggregate(base, ["checkpoint"], column)
        rows = mean.merge(start.rename(columns={"value": "entropy"}), on="checkpoint")
        if len(rows) < 2:
            missing.append(
                f"Correlation of knowledge entropy with {title}: needs two or more starting "
                f"points with both, there are {len(rows)}."
            )
            continue
        rows = rows.sort_values("entropy").assign(series="starting checkpoints", mark="point")
        r = correlate(*(rows[name].to_numpy() for name in ("entropy", "value", "low", "high")))
        plot = series_plot(
            rows,
            X("entropy", "knowledge entropy of the start (nats)"),
            f"{title} ({unit})",
            columns={"checkpoint": "start"},
            bars=True,
        )
        figures.append(
            figure_of(
                study,
                prefix,
                f"correlation-{column}",
                title=f"Knowledge entropy and {title.lower()[:-2]}",
                caption=f"Pearson {r}. One point per starting checkpoint (mean over its runs). "
                + _published_correlation(column),
                paper="§4",
                panels=[Panel((), plot)],
            )
        )
    return figures


def _published_correlation(column: str) -> str:
    r = paper.CORRELATIONS[column]
    text = (
        f"The paper, for stages of OLMo-1B: r = {r:+.2f}, with a p-value that takes n = 10 points "
        f"(p = {p_value(r, 10):.0e}); the four stages of its Table 1 would give "
        f"p = {p_value(r, 4):.2f}."
    )
    return text.replace("-0", "−0")


def _probes(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    table = study.table("probes")
    if table.empty:
        missing.append("Probe log probability over training: no probes.parquet.")
        return []
    injections = study.table("injections")
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run]
        own = own[own["level"].isin(_LEVELS) & own["setting"].isin(_SETTINGS)]
        if own.empty:
            continue
        rules = []
        if not injections.empty:
            steps = sorted(injections.loc[injections["run"] == run, "step"].unique())
            rules = [Rule("x", float(step)) for step in steps]
        ranks = own[["level", "setting"]].replace([*_LEVELS, *_SETTINGS], [0, 1, 2, 0, 1])
        own = own.assign(rank=ranks["level"] * 2 + ranks["setting"]).sort_values(["rank", "step"])
        rows = own.rename(columns={"logprob_per_token": "value"})
        plot = series_plot(
            rows[["level", "setting", "step", "value"]],
            X("step", "training step"),
            "log probability (nats per target token)",
            colour="level",
            dash="setting",
            rules=rules,
        )
        panels.append(Panel((str(run),), plot))
    if not panels:
        missing.append("Probe log probability over training: no finished run has probes.")
        return []
    return [
        figure_of(
            study,
            prefix,
            "probes",
            title="Probe log probability while training",
            caption="Mean over probes by level (colour) and setting (dash)."
            + (
                " Dotted lines: steps at which knowledge is injected."
                if not injections.empty
                else ""
            ),
            paper="Fig. 11",
            panels=panels,
            controls=("run",),
            wide=True,
        )
    ]


def _before_after(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    pairs = (
        ("probe_logprob", "K", "knowledge of the injected facts K (nats per target token)"),
        ("downstream", "P", "zero-shot accuracy P (%)"),
        ("perplexity", "Held-out perplexity", "perplexity on the old corpus (exp of nats)"),
        ("knowledge_entropy", "Knowledge entropy", "knowledge entropy (nats)"),
    )
    figures = []
    base = frame[frame["variant"] == "original"]
    base = base if len(base) else frame
    starts = " and ".join(str(name) for name in base["variant"].unique())
    for stem, title, axis in pairs:
        end = "_nats" if stem == "knowledge_entropy" else ""
        parts = [
            runs.aggregate(base, ["x"], f"{stem}_{when}{end}").assign(series=when)
            for when in ("before", "after")
        ]
        if any(part.empty for part in parts):
            missing.append(f"{title} before and after: not in the results.")
            continue
        rows = pd.concat(parts, ignore_index=True)
        # An interval over runs where a start has several; the value before is the same in all.
        barred = (rows["series"] == "after") & (rows["count"] > 1)
        rows[["low", "high"]] = rows[["low", "high"]].where(barred)
        figures.append(
            figure_of(
                study,
                prefix,
                f"{stem.replace('_', '-')}-before-after",
                title=f"{title} before and after",
                caption=f"Starts: {starts}. "
                + (
                    "Mean over the runs of a start; bars: 95 % Student interval over them, where "
                    "there are several."
                    if barred.any()
                    else "One run per start."
                ),
                paper="Fig. 12" if stem in ("probe_logprob", "downstream") else "",
                panels=[Panel((), series_plot(rows, _start_axis(frame), axis, bars=True))],
            )
        )
    return figures


def _tasks(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    table = study.table("downstream")
    if table.empty or table["task"].nunique() < 2:
        return []
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run].sort_values("when", ascending=False, kind="stable")
        if own.empty:
            continue
        value, error = own["value"] * 100, 1.96 * own["stderr"] * 100
        rows = own[["task"]].assign(
            series=own["when"], value=value, low=value - error, high=value + error, mark="point"
        )
        plot = series_plot(rows, X("task", "task", names=True), "accuracy (%)", bars=True)
        panels.append(Panel((str(run),), plot))
    return [
        figure_of(
            study,
            prefix,
            "tasks",
            title="Downstream tasks before and after",
            caption="Bars: ±1.96 standard errors over items.",
            panels=panels,
            controls=("run",),
        )
    ]


def _training(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    table = study.table("train")
    if table.empty:
        missing.append("Training loss: no train.parquet.")
        return []
    parts, thinned = [], False
    for run in frame["run"]:
        own = table[table["run"] == run].sort_values("step")
        every = max(1, math.ceil(len(own) / _MOST_STEPS))
        thinned = thinned or every > 1
        parts.append(own.iloc[::every][["step", "loss"]].assign(series=str(run)))
    rows = pd.concat(parts, ignore_index=True).rename(columns={"loss": "value"})
    if rows.empty:
        return []
    plot = series_plot(rows, X("step", "training step"), "loss (nats per token)")
    return [
        figure_of(
            study,
            prefix,
            "training-loss",
            title="Training loss of the runs",
            caption="Cross-entropy of the batch, injected texts included."
            + (
                f" At most {_MOST_STEPS} evenly spaced steps of a run are drawn." if thinned else ""
            ),
            panels=[Panel((), plot)],
        )
    ]
