"""Figures of continual learning: A and F by stage, probes over training, before and after."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ke_ray.report import paper, runs
from ke_ray.report.charts import Chart, Figure, Line, Mark, Panel
from ke_ray.report.correlation import correlate, p_value
from ke_ray.report.dynamics_figures import dynamics_figures
from ke_ray.report.sources import Result

__all__ = ["continual_figures", "x_title"]

_LEVELS = ("memorization", "semantic", "compositional")
_SETTINGS = ("paraphrase", "once")


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


def x_title(frame: pd.DataFrame) -> str:
    """What the x axis over starting points counts."""
    known = bool(frame["step"].notna().all())
    return "pretraining step of the start" if known else "start (place in the list)"


def _figure(study: Result, prefix: str, name: str, **parts: object) -> Figure:
    return Figure(
        id=f"{prefix}-{name}",
        command=study.command,
        source=study.path,
        fingerprints=study.fingerprints,
        **parts,  # type: ignore[arg-type]
    )


def _by_stage(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    settings, reason = paper.repeated(study, frame)
    known = settings.dropna().unique()
    figures = []
    for column in ("acquisition", "forgetting"):
        title, unit, factor = runs.RUN_COLUMNS[column]
        lines: list[Line] = []
        for colour, variant in enumerate(frame["variant"].unique()):
            part = frame[frame["variant"] == variant]
            mean = runs.aggregate(part, ["x"], column)
            if mean.empty:
                continue
            name = "mean of runs" if variant == "original" else str(variant)
            x, y = mean["x"].to_numpy(), mean["value"].to_numpy() * factor
            low, high = mean["low"].to_numpy() * factor, mean["high"].to_numpy() * factor
            lines.append(Line(name, x, y, low, high, colour=colour, band=False))
            if len(part) > len(mean):
                single = part[part[column].notna()]
                lines.append(
                    Line(
                        "single runs" if variant == "original" else f"{variant}, single runs",
                        single["x"].to_numpy(),
                        single[column].to_numpy() * factor,
                        colour=colour,
                        kind="dots",
                        labels=single["run"].astype(str).to_list(),
                    )
                )
        if not lines:
            missing.append(f"{title}: no run holds it.")
            continue
        for setting in known:
            values = getattr(paper.TABLE_1[setting], column)
            lines.append(Line(f"paper, Table 1 ({setting})", paper.STEPS, values, colour=1, dash=1))
        figures.append(
            _figure(
                study,
                prefix,
                column,
                title=f"{title} by starting stage",
                caption="Interval: 95 % Student interval over seeds where a start has several "
                "runs, else the run's own 95 % bootstrap interval where it has one."
                + (f" {paper.TREND_ONLY}" if len(known) and column == "acquisition" else ""),
                paper="Fig. 4",
                panels=[Panel((), Chart(x_title(frame), f"{title} ({unit})", lines))],
            )
        )
    if not len(known):
        missing.append(f"The paper's Table 1 is not laid over A and F: {reason}.")
    return figures


def _correlation(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    entropy = "knowledge_entropy_before_nats"
    figures = []
    for place, column in enumerate(("acquisition", "forgetting")):
        title, unit, factor = runs.RUN_COLUMNS[column]
        base = frame[frame["variant"] == "original"]
        mean = runs.aggregate(base, ["checkpoint"], column)
        start = runs.aggregate(base, ["checkpoint"], entropy)[["checkpoint", "value"]]
        both = mean.merge(start.rename(columns={"value": "entropy"}), on="checkpoint")
        if len(both) < 2:
            missing.append(
                f"Correlation of knowledge entropy with {title}: needs two or more starting "
                f"points with both, there are {len(both)}."
            )
            continue
        both = both.sort_values("entropy")
        low, high = both["low"].to_numpy() * factor, both["high"].to_numpy() * factor
        y = both["value"].to_numpy() * factor
        found = correlate(both["entropy"].to_numpy(), y, low, high)
        line = Line(
            "starting checkpoints",
            both["entropy"].to_numpy(),
            y,
            low,
            high,
            colour=place,
            kind="points",
            labels=both["checkpoint"].astype(str).to_list(),
        )
        figures.append(
            _figure(
                study,
                prefix,
                f"correlation-{column}",
                title=f"Knowledge entropy and {title.lower()[:-2]}",
                caption=f"Pearson {found}. One point a starting checkpoint (mean over its runs). "
                + _published_correlation(column),
                paper="§4",
                panels=[
                    Panel(
                        (),
                        Chart("knowledge entropy of the start (nats)", f"{title} ({unit})", [line]),
                    )
                ],
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
    return text.replace("-0", "−0").replace("e-", "e−")


def _probes(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    table = study.table("probes")
    if table.empty:
        missing.append("Probe log probability over training: no probes.parquet.")
        return []
    injections = study.table("injections")
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run]
        if own.empty:
            continue
        marks = []
        if not injections.empty:
            steps = injections.loc[injections["run"] == run, "step"].unique()
            marks = [Mark("x", float(step)) for step in np.sort(steps)]
        lines = [
            Line(
                f"{level}, {setting}",
                part["step"].to_numpy(dtype=float),
                part["logprob_per_token"].to_numpy(dtype=float),
                colour=colour,
                dash=dash,
            )
            for colour, level in enumerate(_LEVELS)
            for dash, setting in enumerate(_SETTINGS)
            if len(
                part := own[(own["level"] == level) & (own["setting"] == setting)].sort_values(
                    "step"
                )
            )
        ]
        axis = "log probability (nats per target token)"
        panels.append(Panel((str(run),), Chart("training step", axis, lines, marks)))
    if not panels:
        missing.append("Probe log probability over training: no finished run has probes.")
        return []
    return [
        _figure(
            study,
            prefix,
            "probes",
            title="Probe log probability while training",
            caption="Mean over probes by level (colour) and setting (solid: paraphrase, dashed: "
            "once)."
            + (
                " Dotted lines with a triangle: steps at which knowledge is injected."
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
        ("probe_logprob", "K", "knowledge of the injected facts K (nats per target token)", 1.0),
        ("downstream", "P", "zero-shot accuracy P (%)", 100.0),
        ("perplexity", "Held-out perplexity", "perplexity on the old corpus (exp of nats)", 1.0),
        ("knowledge_entropy", "Knowledge entropy", "knowledge entropy (nats)", 1.0),
    )
    figures = []
    base = frame[frame["variant"] == "original"]
    base = base if len(base) else frame
    starts = " and ".join(str(name) for name in base["variant"].unique())
    for stem, title, axis, factor in pairs:
        end = "_nats" if stem == "knowledge_entropy" else ""
        lines = []
        for place, when in enumerate(("before", "after")):
            mean = runs.aggregate(base, ["x"], f"{stem}_{when}{end}")
            if mean.empty:
                continue
            several = mean[["low", "high"]].where(mean["count"] > 1) * factor
            barred = when == "after" and bool(several["low"].notna().any())
            lines.append(
                Line(
                    when,
                    mean["x"].to_numpy(),
                    mean["value"].to_numpy() * factor,
                    several["low"].to_numpy() if barred else None,
                    several["high"].to_numpy() if barred else None,
                    colour=place,
                    dash=1 - place,
                    band=False,
                )
            )
        if len(lines) < 2:
            missing.append(f"{title} before and after: not in the results.")
            continue
        figures.append(
            _figure(
                study,
                prefix,
                f"{stem.replace('_', '-')}-before-after",
                title=f"{title} before and after",
                caption=f"Starts: {starts}. "
                + (
                    "Mean over the runs of a start; bars: 95 % Student interval over them, where "
                    "there are several."
                    if any(line.low is not None for line in lines)
                    else "One run per start."
                ),
                paper="Fig. 12" if stem in ("probe_logprob", "downstream") else "",
                panels=[Panel((), Chart(x_title(frame), axis, lines))],
            )
        )
    return figures


def _tasks(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    table = study.table("downstream")
    if table.empty or table["task"].nunique() < 2:
        return []
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run]
        tasks = list(dict.fromkeys(own["task"]))
        lines = []
        for place, when in enumerate(("before", "after")):
            part = own[own["when"] == when].drop_duplicates("task").set_index("task").reindex(tasks)
            value = part["value"].to_numpy(dtype=float) * 100
            error = 1.96 * part["stderr"].to_numpy(dtype=float) * 100
            x = np.arange(len(tasks)) + (place - 0.5) * 0.24
            lines.append(
                Line(when, x, value, value - error, value + error, colour=place, kind="points")
            )
        if tasks:
            panels.append(Panel((str(run),), Chart("task", "accuracy (%)", lines, x_names=tasks)))
    return [
        _figure(
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
    lines = []
    thinned = False
    starts = frame.drop_duplicates("x")["x"].tolist()
    for run, start in zip(frame["run"], frame["x"], strict=True):
        own = table[table["run"] == run].sort_values("step")
        if len(own):
            keep = own.iloc[:: max(1, math.ceil(len(own) / 400))]
            thinned = thinned or len(keep) < len(own)
            lines.append(
                Line(
                    str(run),
                    keep["step"].to_numpy(dtype=float),
                    keep["loss"].to_numpy(dtype=float),
                    colour=starts.index(start),
                    dash=0 if len(frame) == len(starts) else int(_seed(frame, run)),
                    legend=len(frame) <= 12,
                )
            )
    if not lines:
        return []
    return [
        _figure(
            study,
            prefix,
            "training-loss",
            title="Training loss of the runs",
            caption="Cross-entropy of the batch, injected texts included."
            + (" At most 400 steps of a run are drawn, at even distances." if thinned else ""),
            panels=[Panel((), Chart("training step", "loss (nats per token)", lines))],
        )
    ]


def _seed(frame: pd.DataFrame, run: str) -> float:
    seed = frame.loc[frame["run"] == run, "seed"].iloc[0]
    return seed if math.isfinite(seed) else 0
