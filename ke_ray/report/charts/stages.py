"""Figures over the stages that runs start from: A and F, their correlation, before and after.

Continual studies and sweeps share them. A line is a *setting*: what is swept beside seeds and
starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ke_ray.report import paper, runs
from ke_ray.report.axis import TITLES
from ke_ray.report.charts.figure import Figure, Panel, figure_of
from ke_ray.report.charts.plot import X, series_plot
from ke_ray.report.correlation import correlate, p_value
from ke_ray.report.sources import Result

LEVELS = ("memorization", "semantic", "compositional")
KINDS_OF_FACTS = ("paraphrase", "once")
_ENTROPY = "knowledge_entropy_before_nats"


def stage_figures(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    """A and F by stage, of all facts and of each kind of them, and their correlation with H(θ)."""
    frame = frame.assign(run=frame[runs.run_key(study)], setting=runs.setting_names(study, frame))
    return [
        *_by_stage(study, prefix, frame, missing),
        *_by_kind_of_fact(study, prefix, frame),
        *_correlation(study, prefix, frame, missing),
    ]


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
    # A sweep has a figure of its own for Table 1.
    overlaid = study.kind == "continual"
    published_settings, reason = paper.repeated(study, frame)
    repeated = list(published_settings.dropna().unique()) if overlaid else []
    figures = []
    for column in ("acquisition", "forgetting"):
        title, unit, _ = runs.RUN_COLUMNS[column]
        mean = runs.aggregate(frame, ["x", "setting"], column)
        if mean.empty:
            missing.append(f"{title}: no run holds it.")
            continue
        parts = [mean.assign(series=_named(mean, "mean of runs"), mark="line", of="these runs")]
        single = frame[frame[column].notna()]
        if len(single) > len(mean):
            dots = single[["x", "setting", "run"]].assign(value=runs.in_unit(single, column))
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
                paper="Fig. 4, 6, 13",
                panels=[Panel((), plot)],
            )
        )
    if overlaid and not repeated:
        missing.append(f"The paper's Table 1 is not laid over A and F: {reason}.")
    return figures


def _named(rows: pd.DataFrame, what: str) -> pd.Series:
    """``what`` for the unchanged start, else the setting (and ``what``, of single runs)."""
    suffix = f", {what}" if what == "single runs" else ""
    return (rows["setting"] + suffix).where(rows["setting"] != "original", what)


def _by_kind_of_fact(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    """A of the facts shown once and of those shown in paraphrases, from first and last probes."""
    table = study.table("probes")
    if table.empty:
        return []
    # A paragraph has as many probes of each level, so the mean over levels is that over paragraphs.
    own = table[table["level"].isin(LEVELS) & table["setting"].isin(KINDS_OF_FACTS)]
    known = own.groupby(["run", "setting", "step"])["logprob_per_token"].mean().reset_index()
    ends = known.sort_values("step").groupby(["run", "setting"])["logprob_per_token"]
    first, last = ends.first(), ends.last()
    gains = ((last - first) / first.abs()).rename("acquisition").reset_index()
    rows = frame[["run", "x", "checkpoint", "variant"]].merge(gains, on="run")
    if rows.empty:
        return []
    mean = runs.aggregate(rows, ["x", "variant", "setting"], "acquisition")
    names = mean["setting"] + (", " + mean["variant"]).where(mean["variant"] != "original", "")
    plot = series_plot(
        mean.assign(series=names), _start_axis(frame), "acquisition A (%)", bars=True
    )
    return [
        figure_of(
            study,
            prefix,
            "acquisition-by-kind",
            title="Acquisition of facts shown once and in paraphrases",
            caption="A of each kind of facts, by the probes before the first and after the last "
            "step. Bars: 95 % Student interval over the runs of a start, where there are several.",
            paper="Fig. 11",
            panels=[Panel((), plot)],
        )
    ]


def _correlation(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    base = frame[frame["variant"] == "original"]
    several = base["setting"].nunique() > 1
    figures = []
    for column in ("acquisition", "forgetting"):
        title, unit, _ = runs.RUN_COLUMNS[column]
        panels, found, most = [], [], 0
        for setting, own in base.groupby("setting", sort=False):
            mean = runs.aggregate(own, ["checkpoint"], column)
            start = runs.aggregate(own, ["checkpoint"], _ENTROPY)[["checkpoint", "value"]]
            rows = mean.merge(start.rename(columns={"value": "entropy"}), on="checkpoint")
            most = max(most, len(rows))
            if len(rows) < 2:
                continue
            rows = rows.sort_values("entropy").assign(series="starting checkpoints", mark="point")
            r = correlate(rows["entropy"].to_numpy(), rows["value"].to_numpy())
            found.append(f"{setting}: {r}" if several else f"Pearson {r}")
            plot = series_plot(
                rows,
                X("entropy", "knowledge entropy of the start (nats)"),
                f"{title} ({unit})",
                columns={"checkpoint": "start"},
                bars=True,
            )
            panels.append(Panel((str(setting),) if several else (), plot))
        if not panels:
            missing.append(
                f"Correlation of knowledge entropy with {title}: needs two or more starting "
                f"points with both, there are {most}."
            )
            continue
        figures.append(
            figure_of(
                study,
                prefix,
                f"correlation-{column}",
                title=f"Knowledge entropy and {title.lower()[:-2]}",
                caption=f"{'; '.join(found)}. One point per starting checkpoint (mean over its "
                f"runs). {_published_correlation(column)}",
                paper="§4",
                panels=panels,
                controls=("setting",) if several else (),
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


def before_after_figures(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    """K, P, perplexity and knowledge entropy before and after, by stage."""
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
