"""Figures of the dynamics of injected knowledge (Chang et al. 2024): effectivity, retainability."""

from __future__ import annotations

import pandas as pd

from ke_ray.report.charts import Chart, Figure, Line, Mark, Panel
from ke_ray.report.sources import Result

__all__ = ["dynamics_figures"]

_SETTINGS = ("paraphrase", "once")


def dynamics_figures(
    study: Result, prefix: str, frame: pd.DataFrame, missing: list[str]
) -> list[Figure]:
    """What each injection adds, and how much of it stays; names what is missing in ``missing``."""
    common = {
        "command": study.command,
        "source": study.path,
        "fingerprints": study.fingerprints,
        "controls": ("run", "probes"),
    }
    figures: list[Figure] = []
    gained = _panels(
        study.table("dynamics"),
        frame,
        ("step", "effectivity"),
        "training step of the injection",
        "effectivity (nats per target token)",
    )
    if gained:
        figures.append(
            Figure(
                id=f"{prefix}-effectivity",
                title="What each injection adds",
                caption="Effectivity: rise of the log probability from the injection to its local "
                "maximum. Bars: 95 % bootstrap interval over paragraphs, where it is recorded.",
                panels=gained,
                **common,  # type: ignore[arg-type]
            )
        )
    else:
        missing.append("Effectivity of injections: none recorded (needs probes between them).")
    kept = _panels(
        study.table("retainability"),
        frame,
        ("lag", "retainability"),
        "training steps after the local maximum",
        "retainability (share of the rise)",
    )
    if kept:
        figures.append(
            Figure(
                id=f"{prefix}-retainability",
                title="How much of it stays",
                caption="Retainability: share of the rise that is left before the next injection, "
                "mean over the injections after which the log probability rose.",
                panels=kept,
                **common,  # type: ignore[arg-type]
            )
        )
    else:
        missing.append(
            "Retainability: none recorded (needs two or more probes between injections, and a rise "
            "after one of them)."
        )
    return figures


def _panels(
    table: pd.DataFrame,
    frame: pd.DataFrame,
    columns: tuple[str, str],
    x_title: str,
    y_title: str,
) -> list[Panel]:
    x, y = columns
    if not {x, y, "run", "setting", "level"} <= set(table.columns):
        return []
    table = table[table["run"].isin(frame["run"]) & table[y].notna()]
    levels = sorted(table["level"].unique(), key=lambda name: (name != "all", name))
    panels = []
    for run in frame["run"]:
        for level in levels:
            own = table[(table["run"] == run) & (table["level"] == level)]
            lines = []
            for colour, setting in enumerate(_SETTINGS):
                part = own[own["setting"] == setting]
                if part.empty:
                    continue
                mean = part.groupby(x)[y].mean()
                low, high = (
                    part.groupby(x)[f"{y}_{end}"].mean() if f"{y}_{end}" in part else None
                    for end in ("low", "high")
                )
                lines.append(
                    Line(
                        setting,
                        mean.index.to_numpy(dtype=float),
                        mean.to_numpy(dtype=float),
                        low.to_numpy(dtype=float) if low is not None else None,
                        high.to_numpy(dtype=float) if high is not None else None,
                        colour=colour,
                        dash=colour,
                        band=False,
                    )
                )
            if lines:
                chart = Chart(x_title, y_title, lines, [Mark("y", 0.0)])
                panels.append(Panel((str(run), str(level)), chart))
    return panels
