"""Figures of how a scan's coefficients are distributed: histograms and concentration curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from ke_ray.report import series
from ke_ray.report.charts.figure import Figure, Panel
from ke_ray.report.charts.plot import Rule, X, series_plot
from ke_ray.report.sources import Result


def distribution_figures(scan: Result, figure: Callable[..., Figure]) -> list[Figure]:
    """Histograms of s = C̄ / layer mean at three checkpoints, by layer and pooled."""
    order = series.checkpoints(scan)["checkpoint"].to_list()
    chosen = list(dict.fromkeys([*order[:1], *order[len(order) // 2 :][:1], *order[-1:]]))
    arrays = {name: series.coefficients(scan, name) for name in chosen}
    shares = {
        name: array / np.maximum(_mean_of_layers(array), 1e-30)
        for name, array in arrays.items()
        if array is not None and array.size
    }
    if not shares:
        return []
    tau = series.setting(scan, "dormant_threshold")
    rules = [Rule("x", math.log10(tau), f"τ = {tau:g}")] if tau else []
    whole = slice(None)
    density = series_plot(
        _by_checkpoint(_histogram, shares, whole),
        X("s", "log₁₀ of C̄ / layer mean"),
        "share of memories (%)",
        rules=rules,
    )
    mass = series_plot(
        _by_checkpoint(_mass, shares, whole),
        X("memories", "largest memories (% of all)"),
        "share of total C̄ (%)",
        y_from=0.0,
    )
    histograms, lorenz = [Panel(("all layers",), density)], [Panel(("all layers",), mass)]
    for layer in range(min(len(array) for array in shares.values())):
        if any(np.isnan(array[layer]).all() for array in shares.values()):
            continue  # it has no feed-forward part
        one, key = slice(layer, layer + 1), (f"layer {layer}",)
        histograms.append(Panel(key, density.over(_by_checkpoint(_histogram, shares, one))))
        lorenz.append(Panel(key, mass.over(_by_checkpoint(_mass, shares, one))))
    stages, corpus = ", ".join(shares), series.corpora(scan)[0]
    return [
        figure(
            "distribution",
            title="Distribution of memory coefficients",
            caption="Histograms of mean |coefficient| relative to its layer's mean, at "
            f"{stages}, on {corpus}. Values beyond the axis are counted in the outermost bins.",
            panels=histograms,
            controls=("layers",),
        ),
        figure(
            "mass",
            title="How few memories carry the mass",
            caption=f"Share of a layer's total coefficient held by its largest memories, at "
            f"{stages}, on {corpus}; several layers are averaged. A straight line would be an even "
            "spread.",
            panels=lorenz,
            controls=("layers",),
        ),
    ]


def _mean_of_layers(array: np.ndarray) -> np.ndarray:
    """[n_layers, 1], each over the layer's own memories."""
    num_memories = np.maximum((~np.isnan(array)).sum(axis=1, keepdims=True), 1)
    return np.asarray(np.nansum(array, axis=1, keepdims=True) / num_memories)


def _by_checkpoint(
    rows_of: Callable[[np.ndarray, str], pd.DataFrame],
    shares: dict[str, np.ndarray],
    layers: slice,
) -> pd.DataFrame:
    parts = [rows_of(array[layers], name) for name, array in shares.items()]
    return pd.concat(parts, ignore_index=True).assign(mark="line")


def _histogram(shares: np.ndarray, name: str) -> pd.DataFrame:
    edges = np.linspace(-3.0, 2.0, 51)
    logs = np.log10(np.clip(shares[~np.isnan(shares)], 1e-3, 1e2))
    density = np.histogram(logs, edges)[0] / logs.size * 100
    centres = (edges[1:] + edges[:-1]) / 2
    return pd.DataFrame({"series": name, "s": centres.round(6), "value": density})


def _mass(shares: np.ndarray, name: str) -> pd.DataFrame:
    """Cumulative share of the mass over the share of the memories, from the largest down."""
    m = shares.shape[1]
    at = np.unique(np.geomspace(1, m, 60).round().astype(int))
    curves = []
    for layer in shares[~np.isnan(shares).all(axis=1)]:
        largest = np.sort(layer[~np.isnan(layer)])[::-1]
        cumulative = largest.cumsum() / np.maximum(largest.sum(), 1e-30) * 100
        num_memories = np.arange(1, largest.size + 1) / largest.size
        curves.append(np.interp(at / m, num_memories, cumulative))
    return pd.DataFrame(
        {"series": name, "memories": at / m * 100, "value": np.mean(curves, axis=0)}
    )
