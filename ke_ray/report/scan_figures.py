"""Figures of one scan: entropies over pretraining, layers, distributions, concentration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from ke_ray.report import series
from ke_ray.report.charts import Chart, Figure, HeatMap, Line, Mark, Panel, TextTable
from ke_ray.report.scales import ordered
from ke_ray.report.sources import Result

__all__ = ["fingerprints", "scan_figures", "x_title"]

_ENTROPIES = {
    "knowledge_entropy": "Fig. 2, A.2",
    "knowledge_entropy_relu": "A.2",
    "attention_entropy": "Fig. 3",
    "next_token_entropy": "A.4",
}
_AXES = ("linear steps", "log steps")
_Z = 1.96  # standard errors of a 95 % interval


def x_title(scan: Result) -> str:
    """What the x axis of a scan counts."""
    return "pretraining step" if series.has_steps(scan) else "checkpoint (place in the list)"


def fingerprints(scan: Result) -> list[tuple[str, str]]:
    """(what, sha256) of the data and, shortened to first and last, of the weights."""
    table = scan.table("entropy")
    if table.empty:
        return []
    good = table[table["status"] == "ok"]
    found: list[tuple[str, str]] = []
    for corpus in series.corpora(scan):
        hashes = good.loc[good["corpus"] == corpus, "data_sha256"].dropna().unique()
        found += [(f"data {corpus}", str(value)) for value in hashes]
    order = series.checkpoints(scan)["checkpoint"]
    for name in dict.fromkeys([*order[:1], *order[-1:]]):
        hashes = good.loc[good["checkpoint"] == name, "weights_sha256"].dropna().unique()
        found += [(f"weights {name}", str(value)) for value in hashes]
    return found


def scan_figures(scan: Result, prefix: str) -> list[Figure]:
    """All figures that this scan's files can fill, in reading order."""
    held = series.measures(scan)
    if not held:
        return []
    figures = [_over_steps(scan, prefix, name) for name in held if name in _ENTROPIES]
    figures.append(_changes(scan, prefix, held))
    curves = series.curves(scan)
    for place, (label, curve) in enumerate(curves):
        own = prefix if len(curves) == 1 else f"{prefix}-{place + 1}"
        parts = [*_layers(curve, own, series.measures(curve)), *_distributions(curve, own)]
        figures += [replace(p, title=f"{p.title}: {label}") if label else p for p in parts]
    figures += [_over_steps(scan, prefix, name) for name in held if name not in _ENTROPIES]
    return figures


def _figure(scan: Result, prefix: str, name: str, **parts: object) -> Figure:
    return Figure(
        id=f"{prefix}-{name}",
        command=scan.command,
        source=scan.path,
        fingerprints=fingerprints(scan),
        **parts,  # type: ignore[arg-type]
    )


def _log_choice(scan: Result) -> tuple[str, ...]:
    """A log axis is offered where there are steps spread over a factor of ten."""
    order = series.checkpoints(scan)
    steps = order["x"].to_numpy()
    positive = steps[steps > 0]
    spread = len(positive) > 2 and positive.max() / positive.min() >= 10
    return _AXES if spread and series.has_steps(scan) else ()


def _banded(frame: pd.DataFrame, name: str, colour: int) -> Line:
    value, error = frame["value"].to_numpy(), _Z * frame["stderr"].to_numpy()
    return Line(
        name,
        frame["x"].to_numpy(),
        value,
        value - error,
        value + error,
        colour=colour,
        labels=frame["checkpoint"].to_list(),
    )


def _lines(scan: Result, values: Callable[..., pd.DataFrame], measure: str) -> list[Line]:
    """A line for each curve and corpus."""
    lines: list[Line] = []
    for label, curve in series.curves(scan):
        for corpus in series.corpora(curve):
            frame = values(curve, measure, corpus)
            if not frame.empty:
                name = f"{label}: {corpus}" if label else corpus
                lines.append(_banded(frame, name, len(lines)))
    return lines


def _split(scan: Result) -> str:
    """What a caption says where the scan is of several curves."""
    labels = [label for label, _ in series.curves(scan)]
    if len(labels) < 2:
        return ""
    return (
        f" {len(labels)} curves, since architectures, sizes or stages differ ("
        + "; ".join(labels)
        + "): each has its own steps and its own first checkpoint."
    )


def _ceilings(scan: Result) -> list[tuple[str, series.Ceiling]]:
    found = [(label, series.ceiling(curve)) for label, curve in series.curves(scan)]
    return [(label, bound) for label, bound in found if bound is not None]


def _over_steps(scan: Result, prefix: str, measure: str) -> Figure:
    title, unit = series.MEASURE_TITLES.get(measure, (measure, ""))
    lines = _lines(scan, series.totals, measure)
    marks: list[Mark] = []
    caption = "Bands: ±1.96 jackknife standard errors over groups of instances." + _split(scan)
    bounds = {bound: label for label, bound in _ceilings(scan)}
    if measure == "knowledge_entropy" and bounds:
        values = np.concatenate([np.asarray(line.y, dtype=float) for line in lines])
        span = max(float(np.ptp(values)), 1e-9)
        for bound in bounds:
            if 0 <= bound.nats - values.max() <= 2 * span:
                marks.append(Mark("y", bound.nats, str(bound)))
        caption += " Largest possible value: " + "; ".join(
            str(bound) + (f" ({label})" if len(bounds) > 1 else "")
            for bound, label in bounds.items()
        )
        caption += "."
    if measure in ("participation_ratio", "gini", "top_k_mass", "dormant_share"):
        caption += " Mean over layers."
    elif measure != "next_token_entropy":
        caption += " Sum over layers."
    if measure == "top_k_mass":
        share = series.setting(scan, "top_k_fraction")
        caption += f" Largest {100 * share:.3g} % of a layer's memories." if share else ""
    if measure == "dormant_share":
        tau = series.setting(scan, "dormant_threshold")
        caption += f" Share with C̄ ≤ τ · layer mean, τ = {tau:.3g}." if tau is not None else ""
    axis = f"{title.lower()} ({unit})" if unit else title.lower()
    choices = _log_choice(scan)
    panels = [
        Panel(
            (choice,) if choices else (),
            Chart(x_title(scan), axis, lines, marks, log_x=choice == _AXES[1]),
        )
        for choice in choices or ("",)
    ]
    return _figure(
        scan,
        prefix,
        measure.replace("_", "-"),
        title=title,
        caption=caption,
        paper=_ENTROPIES.get(measure, ""),
        panels=panels,
        controls=("x axis",) if choices else (),
    )


def _changes(scan: Result, prefix: str, held: list[str]) -> Figure:
    panels = []
    for measure in held:
        title, unit = series.MEASURE_TITLES.get(measure, (measure, ""))
        lines = _lines(scan, series.paired_change, measure)
        if lines:
            axis = f"change of {title.lower()}" + (f" ({unit})" if unit else "")
            panels.append(Panel((title,), Chart(x_title(scan), axis, lines, [Mark("y", 0.0)])))
    paired = not scan.table("replicates").empty
    return _figure(
        scan,
        prefix,
        "changes",
        title="Change since the first checkpoint, corpora side by side",
        caption=(
            "Bands: ±1.96 paired jackknife standard errors (the difference itself is jackknifed, "
            "since both checkpoints saw the same instances)."
            if paired
            else "No error band: the folder keeps no replicates.parquet."
        )
        + _split(scan),
        paper="Fig. 7",
        panels=panels,
        controls=("measure",),
    )


def _layers(scan: Result, prefix: str, held: list[str]) -> list[Figure]:
    curves: list[Panel] = []
    maps: list[Panel] = []
    for measure in held:
        title, unit = series.MEASURE_TITLES.get(measure, (measure, ""))
        for corpus in series.corpora(scan):
            order, matrix = series.layer_matrix(scan, measure, corpus)
            n_layers = len(matrix)
            if not n_layers or not len(order):
                continue
            x = order["x"].to_numpy()
            lines = [
                Line(
                    f"layer {layer}",
                    x,
                    matrix[layer],
                    colour=ordered(layer / max(1, n_layers - 1)),
                    labels=None,
                )
                for layer in range(n_layers)
            ]
            axis = f"{title.lower()} of a layer" + (f" ({unit})" if unit else "")
            curves.append(
                Panel(
                    (title, corpus),
                    Chart(x_title(scan), axis, lines, ramp=("layer 0", f"layer {n_layers - 1}")),
                )
            )
            names = [f"{value:g}" for value in x]
            layers = [str(layer) for layer in range(n_layers)]
            for shown in ("change since the first checkpoint", "value"):
                values = matrix if shown == "value" else matrix - matrix[:, :1]
                maps.append(
                    Panel(
                        (title, corpus, shown),
                        HeatMap(
                            x_title(scan),
                            "layer",
                            unit,
                            values,
                            names,
                            layers,
                            centre=None if shown == "value" else 0.0,
                        ),
                    )
                )
    figures = []
    if curves:
        figures.append(
            _figure(
                scan,
                prefix,
                "layers",
                title="Layer by layer over pretraining",
                caption="One line a layer, from the first (blue) to the last (ochre).",
                paper="Fig. 8",
                panels=curves,
                controls=("measure", "corpus"),
            )
        )
        figures.append(
            _figure(
                scan,
                prefix,
                "layer-map",
                title="Layer × checkpoint",
                caption="Columns are checkpoints in order, not to the scale of steps.",
                paper="Fig. 8",
                panels=maps,
                controls=("measure", "corpus", "shown"),
            )
        )
    return figures


def _distributions(scan: Result, prefix: str) -> list[Figure]:
    """Histograms of s = C̄ / layer mean at three stages, by layer and pooled."""
    order = series.checkpoints(scan)["checkpoint"].to_list()
    chosen = list(dict.fromkeys([*order[:1], *order[len(order) // 2 :][:1], *order[-1:]]))
    arrays = {name: series.coefficients(scan, name) for name in chosen}
    held = {name: array for name, array in arrays.items() if array is not None and array.size}
    if not held:
        return []
    shares = {
        name: array / np.maximum(array.mean(axis=1, keepdims=True), 1e-30)
        for name, array in held.items()
    }
    n_layers = min(len(array) for array in shares.values())
    tau = series.setting(scan, "dormant_threshold")
    edges = np.linspace(-3.0, 2.0, 51)
    centres = (edges[1:] + edges[:-1]) / 2
    panels, lorenz = [], []
    for choice in ("all layers", *(f"layer {layer}" for layer in range(n_layers))):
        rows = slice(None) if choice == "all layers" else slice(*_one(choice))
        lines, curves = [], []
        for place, (name, array) in enumerate(shares.items()):
            logs = np.log10(np.clip(array[rows].ravel(), 1e-3, 1e2))
            density = np.histogram(logs, edges)[0] / logs.size
            lines.append(Line(name, centres, density * 100, colour=place, dash=place))
            mass, top = _mass(array[rows])
            curves.append(Line(name, top, mass, colour=place, dash=place))
        marks = [Mark("x", math.log10(tau), f"τ = {tau:g}")] if tau else []
        panels.append(
            Panel(
                (choice,),
                Chart("log₁₀ of C̄ / layer mean", "share of memories (%)", lines, marks),
            )
        )
        lorenz.append(
            Panel(
                (choice,),
                Chart(
                    "largest memories (% of all)", "share of total C̄ (%)", curves, include_y=(0,)
                ),
            )
        )
    stages = ", ".join(held)
    return [
        _figure(
            scan,
            prefix,
            "distribution",
            title="Distribution of memory coefficients",
            caption=f"Histograms of mean |coefficient| relative to its layer's mean, at {stages}. "
            "Values beyond the axis are counted in the outermost bins.",
            panels=panels,
            controls=("layers",),
        ),
        _figure(
            scan,
            prefix,
            "mass",
            title="How few memories carry the mass",
            caption=f"Share of a layer's total coefficient held by its largest memories, at "
            f"{stages}; several layers are averaged. A straight line would be an even spread.",
            panels=lorenz,
            controls=("layers",),
        ),
    ]


def _one(choice: str) -> tuple[int, int]:
    layer = int(choice.split()[-1])
    return layer, layer + 1


def _mass(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cumulative share of the mass, share of the memories), both in %, from the largest down."""
    ordered = np.sort(shares, axis=1)[:, ::-1]
    total = np.maximum(ordered.sum(axis=1, keepdims=True), 1e-30)
    cumulative = (ordered.cumsum(axis=1) / total).mean(axis=0) * 100
    m = cumulative.size
    places = np.unique(np.geomspace(1, m, 60).round().astype(int))
    return cumulative[places - 1], places / m * 100


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
