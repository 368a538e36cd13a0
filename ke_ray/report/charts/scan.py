"""Figures of one scan: entropies over pretraining, layers, distributions, concentration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from ke_ray.report import axis, paper, series
from ke_ray.report.ceiling import Ceiling
from ke_ray.report.charts.distribution import distribution_figures
from ke_ray.report.charts.figure import Figure, Panel, Plot, TextTable, figure_of
from ke_ray.report.charts.plot import Rule, X, heat_map, series_plot
from ke_ray.report.charts.similarity import similarity_figures
from ke_ray.report.charts.training_runs import ALL_SEEDS, border_rules, runs_caption, with_means
from ke_ray.report.charts.weights import weight_figures
from ke_ray.report.sources import Result

_ENTROPIES = {  # measure -> where the paper shows it
    "knowledge_entropy": "Fig. 2",
    "knowledge_entropy_relu": "Fig. 9, A.2",
    "token_entropy": "",
    "memory_information": "",
    "attention_entropy": "Fig. 3",
    "next_token_entropy": "A.4",
}
_TERMS = ("token_entropy", "memory_information")  # add up to knowledge entropy
_CHECKPOINT = {"checkpoint": "checkpoint"}


def x_title(scan: Result) -> str:
    """What the x axis of a scan counts."""
    return axis.TITLES[series.unit(scan)]


def measure_axis(scan: Result, measure: str) -> tuple[str, str]:
    """(title of a measure, title of its axis with the unit)."""
    title, unit, _ = series.declared(scan, measure)
    return title, f"{title.lower()} ({unit})" if unit else title.lower()


def axes(scan: Result) -> dict[str, X]:
    """Choice -> horizontal axis: linear and, where that helps, logarithmic; the scan's own first.

    Tokens are offered beside steps where they are known of every checkpoint.
    """
    order = _with_tokens(scan, series.checkpoints(scan))
    unit, title = series.unit(scan), x_title(scan)
    made = {unit if unit in ("tokens", "words") else "linear steps": X("x", title)}
    if unit != "place" and _spread(order["x"]):
        made[f"log {unit}" if unit in ("tokens", "words") else "log steps"] = X("x", title, True)
    if "tokens" in order and unit != "tokens":
        made["tokens"] = X("tokens", axis.TITLES["tokens"])
        if _spread(order["tokens"]):
            made["log tokens"] = X("tokens", axis.TITLES["tokens"], log=True)
    return made


def _spread(values: pd.Series) -> bool:
    """Whether a logarithmic axis is worth offering: three values over a factor of ten."""
    positive = values[values > 0]
    return len(positive) > 2 and positive.max() / positive.min() >= 10


def _with_tokens(scan: Result, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ``tokens``, where those of every checkpoint are known."""
    num_tokens = series.tokens(scan)
    return rows if num_tokens is None else rows.assign(tokens=rows["checkpoint"].map(num_tokens))


def fingerprints(scan: Result) -> list[tuple[str, str]]:
    """(what, sha256) of the data and of the weights of the first and the last checkpoint."""
    table = scan.table("entropy")
    if table.empty:
        return []
    good = table[table["status"] == "ok"]
    hashes: list[tuple[str, str]] = []
    for corpus in series.corpora(scan):
        values = good.loc[good["corpus"] == corpus, "data_sha256"].dropna().unique()
        hashes += [(f"data {corpus}", str(value)) for value in values]
    order = series.checkpoints(scan)["checkpoint"]
    for name in dict.fromkeys([*order[:1], *order[-1:]]):
        values = good.loc[good["checkpoint"] == name, "weights_sha256"].dropna().unique()
        hashes += [(f"weights {name}", str(value)) for value in values]
    return hashes


def measure_rows(
    scan: Result, measure: str, values: Callable[..., pd.DataFrame] = series.totals
) -> pd.DataFrame:
    """One row per curve, corpus and checkpoint, with 95 % intervals.

    ``values`` is ``series.totals``, or ``series.paired_change`` for changes.
    """
    parts = []
    curves = series.curves(scan)
    for label, curve in curves:
        for corpus in series.corpora(curve):
            rows = values(curve, measure, corpus)
            error = series.critical_t(curve, corpus) * rows["stderr"]
            ends = {"low": rows["value"] - error, "high": rows["value"] + error}
            name = f"{label}: {corpus}" if label else corpus
            parts.append(_with_tokens(scan, rows.assign(series=name, corpus=corpus, **ends)))
    return with_means(curves, pd.concat(parts, ignore_index=True))


def split_caption(scan: Result) -> str:
    """What a caption says where the scan is of several curves, seeds or stages."""
    curves = series.curves(scan)
    caption = ""
    if len(curves) > 1:
        caption += (
            f" {len(curves)} curves, since architectures, sizes, seeds or branches differ ("
            + "; ".join(label for label, _ in curves)
            + "): each has its own first checkpoint."
        )
    return caption + runs_caption(scan, curves)


def _ceilings(scan: Result) -> dict[Ceiling, str]:
    """The largest possible knowledge entropies, each with the label of a curve that has it."""
    bounds = ((series.ceiling(curve), label) for label, curve in series.curves(scan))
    return {bound: label for bound, label in bounds if bound is not None}


def band_caption(rows: pd.DataFrame, errors: str) -> str:
    """What the bands are, where any is drawn: rows with an interval of some width."""
    of_means = "mark" in rows and bool((rows["mark"] == "thin").any())
    if of_means:
        rows = rows[(rows["mark"] != "thin") & (rows["checkpoint"] != ALL_SEEDS)]
        if rows.empty:
            return "Bands: the range over seeds."
    has_errors = (rows["low"] < rows["value"]).groupby(rows["series"]).any()
    caption = "No error band: the results hold no error of this."
    if has_errors.any():
        caption = f"Bands: 95 % Student intervals by {errors}"
        caption += "." if has_errors.all() else ", where there are any."
    return f"{caption} Bands of means: the range over seeds." if of_means else caption


def scan_figures(scan: Result, prefix: str) -> list[Figure]:
    """All figures that this scan's files can fill, in reading order."""
    measures = series.measures(scan)
    if not measures:
        return []
    hashes = fingerprints(scan)

    def figure(name: str, **parts: object) -> Figure:
        return figure_of(scan, prefix, name, fingerprints=hashes, **parts)

    return [
        *(_over_steps(scan, name, figure) for name in measures if name in _ENTROPIES),
        _changes(scan, measures, figure),
        *_by_curve(scan, figure),
        *(_over_steps(scan, name, figure) for name in measures if name not in _ENTROPIES),
    ]


def _by_curve(scan: Result, figure: Callable[..., Figure]) -> list[Figure]:
    """The figures that a scan has once per curve."""
    curves = series.curves(scan)
    figures: list[Figure] = []
    for number, (label, curve) in enumerate(curves, 1):
        own = functools.partial(_figure_of_curve, figure, number, label)
        make = figure if len(curves) == 1 else own
        figures += _layers(curve, series.measures(curve), make)
        figures += distribution_figures(curve, make)
        figures += similarity_figures(curve, make)
        figures += weight_figures(curve, x_title(scan), make)
    return figures


def _figure_of_curve(
    figure: Callable[..., Figure], number: int, label: str, name: str, *, title: str, **parts: Any
) -> Figure:
    return figure(f"{number}-{name}", title=f"{title}: {label}", **parts)


def _published_axis(scan: Result, measure: str) -> list[Rule]:
    """Marks at the ends of the axis of the paper's figure, of the paper's models."""
    ends = paper.axis_of_figure(scan, measure) or ()
    return [Rule("y", end, f"the paper's axis: {end:g}") for end in ends]


def measure_plot(
    scan: Result, measure: str, rows: pd.DataFrame, x: X, *, interactive: bool = True
) -> Plot:
    """The model-wide value of a measure, one line per curve and corpus, from ``measure_rows``."""
    rules = [*border_rules(scan, x), *_published_axis(scan, measure)]
    if measure == "knowledge_entropy" and len(rows):
        span = max(float(np.ptp(rows["value"])), 1e-9)
        rules += [
            Rule("y", bound.nats, str(bound))
            for bound in _ceilings(scan)
            if 0 <= bound.nats - rows["value"].max() <= 2 * span
        ]
    return series_plot(
        rows,
        x,
        measure_axis(scan, measure)[1],
        columns=_CHECKPOINT,
        rules=rules,
        interactive=interactive,
    )


def _over_steps(scan: Result, measure: str, figure: Callable[..., Figure]) -> Figure:
    choices, rows = axes(scan), measure_rows(scan, measure)
    panels = [
        Panel((choice,) if len(choices) > 1 else (), measure_plot(scan, measure, rows, x))
        for choice, x in choices.items()
    ]
    caption = band_caption(rows, "jackknife standard errors over groups of instances")
    caption = f"{caption}{split_caption(scan)}".strip()
    bounds = _ceilings(scan)
    if measure == "knowledge_entropy" and bounds:
        shown = (f"{b} ({label})" if len(bounds) > 1 else str(b) for b, label in bounds.items())
        caption += f" Largest possible value: {'; '.join(shown)}."
    total = series.declared(scan, measure)[2]
    caption += {"mean": " Mean over layers.", "sum": " Sum over layers."}.get(total, "")
    if measure in (absent := series.absent(scan)):
        caption += f" Layers without a value are left out: {absent[measure]}"
    if measure == "top_k_mass":
        share = series.setting(scan, "top_k_fraction")
        caption += f" Largest {100 * share:.3g} % of a layer's memories." if share else ""
    if measure == "dormant_share":
        tau = series.setting(scan, "dormant_threshold")
        caption += f" Share with C̄ ≤ τ · layer mean, τ = {tau:.3g}." if tau is not None else ""
    return figure(
        measure.replace("_", "-"),
        title=measure_axis(scan, measure)[0],
        caption=caption,
        paper=_ENTROPIES.get(measure, ""),
        panels=panels,
        controls=("x axis",) if len(choices) > 1 else (),
    )


def _changes(scan: Result, measures: list[str], figure: Callable[..., Figure]) -> Figure:
    panels, drawn = [], []
    terms: dict[str, pd.DataFrame] = {}
    x = X("x", x_title(scan))
    for measure in measures:
        rows = measure_rows(scan, measure, series.paired_change)
        if rows.empty:
            continue
        title, y_axis = measure_axis(scan, measure)
        drawn.append(rows.assign(series=rows["series"] + measure)[rows["x"] != rows["x"].min()])
        plot = series_plot(
            rows,
            x,
            f"change of {y_axis}",
            columns=_CHECKPOINT,
            rules=[Rule("y", 0.0), *border_rules(scan, x)],
        )
        panels.append(Panel((title,), plot))
        terms[measure] = rows.assign(series=rows["series"] + f": {title.lower()}")
    if set(_TERMS) <= set(terms):
        rows = pd.concat(terms[name] for name in ("knowledge_entropy", *_TERMS) if name in terms)
        plot = series_plot(
            rows.reset_index(drop=True),
            x,
            "change (nats)",
            columns=_CHECKPOINT,
            rules=[Rule("y", 0.0), *border_rules(scan, x)],
        )
        panels.append(Panel(("Knowledge entropy and its two terms",), plot))
    return figure(
        "changes",
        title="Change since the first checkpoint",
        caption=band_caption(
            pd.concat(drawn),
            "paired jackknife standard errors (the difference itself is jackknifed, since both "
            "checkpoints saw the same instances)",
        )
        + split_caption(scan),
        paper="Fig. 7",
        panels=panels,
        controls=("measure",),
    )


def layer_rows(scan: Result, measure: str, corpus: str) -> pd.DataFrame:
    """One row per layer and checkpoint: [checkpoint, x, layer, value, change, …]."""
    order, matrix = series.layer_matrix(scan, measure, corpus)
    if not matrix.size:
        return pd.DataFrame(columns=["checkpoint", "x", "layer", "value", "change"])
    rows = pd.concat([order] * len(matrix), ignore_index=True)
    return (
        rows.assign(
            at=rows["x"].map("{:g}".format),
            layer=np.repeat(np.arange(len(matrix)), len(order)),
            value=matrix.ravel(),
            change=(matrix - matrix[:, :1]).ravel(),
            mark="line",  # one table of rows for curves and maps
        )
        .dropna(subset="value", ignore_index=True)
        .drop(columns="step")
    )


def _layers(scan: Result, measures: list[str], figure: Callable[..., Figure]) -> list[Figure]:
    curves: list[Panel] = []
    maps: list[Panel] = []
    x = X("x", x_title(scan))
    for measure in measures:
        title, unit, _ = series.declared(scan, measure)
        for corpus in series.corpora(scan):
            rows = layer_rows(scan, measure, corpus)
            if rows.empty:
                continue
            y_axis = f"{title.lower()} of a layer" + (f" ({unit})" if unit else "")
            plot = series_plot(
                rows,
                x,
                y_axis,
                columns=_CHECKPOINT,
                colour="layer",
                spread="layer",
                rules=[*border_rules(scan, x), *_published_axis(scan, f"{measure} of a layer")],
            )
            curves.append(Panel((title, corpus), plot))
            for shown in ("change", "value"):
                plot = heat_map(
                    rows,
                    X("at", x.title),
                    X("layer", "layer"),
                    unit,
                    value=shown,
                    diverging=shown == "change",
                    columns=_CHECKPOINT,
                )
                name = "change since the first checkpoint" if shown == "change" else shown
                maps.append(Panel((title, corpus, name), plot))
    if not curves:
        return []
    return [
        figure(
            "layers",
            title="Layer by layer over pretraining",
            caption="One line per layer, from the first (blue) to the last (ochre).",
            paper="Fig. 8",
            panels=curves,
            controls=("measure", "corpus"),
        ),
        figure(
            "layer-map",
            title="Layer × checkpoint",
            caption="Columns are checkpoints in order, not to the scale of steps.",
            paper="Fig. 8",
            panels=maps,
            controls=("measure", "corpus", "shown"),
        ),
    ]


def failures(scan: Result) -> TextTable:
    """Checkpoints that could not be scored."""
    rows = series.failed(scan)
    return TextTable(
        ("checkpoint", "corpus", "error"),
        [
            [row["checkpoint"], row["corpus"] or "–", row["error"] or "no reason recorded"]
            for row in rows.to_dict("records")
        ],
    )


def duplicates(scan: Result) -> TextTable:
    """Checkpoints whose weights are those of another."""
    table = scan.table("entropy")
    if table.empty:
        return TextTable(("checkpoint", "same weights as"), [])
    rows = table.loc[table["duplicate_of"].notna(), ["checkpoint", "duplicate_of"]]
    return TextTable(("checkpoint", "same weights as"), rows.drop_duplicates().to_numpy().tolist())
