"""Figures of continual learning: by stage, probes over training, before and after, tasks, loss."""

from __future__ import annotations

import math

import pandas as pd

from ke_ray.core.intervals import wilson_interval
from ke_ray.report import runs
from ke_ray.report.charts.dynamics import dynamics_figures
from ke_ray.report.charts.figure import Figure, Panel, figure_of
from ke_ray.report.charts.plot import Rule, X, series_plot
from ke_ray.report.charts.stages import (
    KINDS_OF_FACTS,
    LEVELS,
    before_after_figures,
    stage_figures,
)
from ke_ray.report.sources import Result

_MOST_STEPS = 400  # of a run whose loss is drawn


def continual_figures(study: Result, prefix: str) -> tuple[list[Figure], list[str]]:
    """(figures that the files can fill, what is missing and why)."""
    frame = runs.good_runs(study)
    if frame.empty:
        return [], ["No run has finished yet."]
    missing: list[str] = []
    figures = [
        *stage_figures(study, prefix, frame, missing),
        *_probes(study, prefix, frame, missing),
        *before_after_figures(study, prefix, frame, missing),
        *_tasks(study, prefix, frame),
        *_training(study, prefix, frame, missing),
        *dynamics_figures(study, prefix, frame, missing),
    ]
    return figures, missing


def _probes(study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]) -> list[Figure]:
    table = study.table("probes")
    if table.empty:
        missing.append("Probe log probability over training: no probes.parquet.")
        return []
    injections = study.table("injections")
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run]
        own = own[own["level"].isin(LEVELS) & own["setting"].isin(KINDS_OF_FACTS)]
        if own.empty:
            continue
        rules = []
        if not injections.empty:
            steps = sorted(injections.loc[injections["run"] == run, "step"].unique())
            rules = [Rule("x", float(step)) for step in steps]
        ranks = own[["level", "setting"]].replace([*LEVELS, *KINDS_OF_FACTS], [0, 1, 2, 0, 1])
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


def _tasks(study: Result, prefix: str, frame: pd.DataFrame) -> list[Figure]:
    table = study.table("downstream")
    if table.empty or table["task"].nunique() < 2:
        return []
    panels = []
    for run in frame["run"]:
        own = table[table["run"] == run].sort_values("when", ascending=False, kind="stable")
        if own.empty:
            continue
        low, high = wilson_interval(own["value"].to_numpy(), own["num_items"].to_numpy())
        rows = own[["task"]].assign(
            series=own["when"],
            value=own["value"] * 100,
            low=low * 100,
            high=high * 100,
            mark="point",
        )
        plot = series_plot(rows, X("task", "task", names=True), "accuracy (%)", bars=True)
        panels.append(Panel((str(run),), plot))
    return [
        figure_of(
            study,
            prefix,
            "tasks",
            title="Downstream tasks before and after",
            caption="Bars: 95 % Wilson interval over items.",
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
