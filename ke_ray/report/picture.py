"""A picture of a scan without a browser: the entropies over pretraining, as PNG."""

from __future__ import annotations

import io
import os

import numpy as np

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.report import series
from ke_ray.report.sources import Result, find_results
from ke_ray.storage.ownership import check_replaceable

__all__ = ["PALETTE", "picture"]

# Okabe and Ito's colours, safe for colour-blind readers; strongest contrast on white first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_MADE_BY = "ke_ray"  # in the PNG's text: a picture that may be drawn anew
_PANELS = ("knowledge_entropy", "attention_entropy", "next_token_entropy")


def picture(scan_folder: str | os.PathLike[str], output_png: str | os.PathLike[str]) -> str:
    """Draw knowledge, attention and next-token entropy over pretraining steps.

    Totals in nats, one line a corpus, bands of ±1.96 jackknife standard errors; the ceiling
    ``n_layers · ln d_mlp`` is written into the panel of knowledge entropy and drawn where it is
    near. Only measures that the scan holds get a panel.

    Args:
        scan_folder: a scan's result folder, or a folder that holds exactly one.
        output_png: where the PNG (about 1,280 px wide) goes, any fsspec URI.

    Returns:
        ``output_png``.

    Raises:
        UserError: there is no such folder.
        ResultsError: there is no scan in it, or the scan has no scored checkpoint.
        StorageError: a file that ke_ray did not make stands at ``output_png``.
    """
    target = os.fspath(output_png)
    check_replaceable(target, b"Software\0" + _MADE_BY.encode(), "entropy.png")
    scans = [result for result in find_results([scan_folder]) if result.kind == "scan"]
    if len(scans) != 1:
        raise ResultsError(
            f"'{os.fspath(scan_folder)}' holds {len(scans)} scans; one is needed for a picture. "
            "Give the output folder of 'ke-ray scan'."
        )
    scan = scans[0]
    held = [name for name in _PANELS if name in series.measures(scan)]
    held = held or series.measures(scan)[:3]
    if not held:
        raise ResultsError(
            f"The scan '{scan.path}' has no scored checkpoint yet, so there is nothing to draw."
        )
    storage.write_atomic(target, _draw(scan, held))
    return target


def _draw(scan: Result, held: list[str]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(held), 3.6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    curves = [
        (f"{label}: {corpus}" if label else corpus, curve, corpus)
        for label, curve in series.curves(scan)
        for corpus in series.corpora(curve)
    ]
    bounds = {series.ceiling(curve) for _, curve, _ in curves}
    with_steps = series.has_steps(scan)
    for place, measure in enumerate(held):
        axes = figure.add_subplot(1, len(held), place + 1)
        title, unit = series.MEASURE_TITLES.get(measure, (measure, ""))
        low, high = np.inf, -np.inf
        for index, (label, curve, corpus) in enumerate(curves):
            line = series.totals(curve, measure, corpus)
            if line.empty:
                continue
            colour = PALETTE[index % len(PALETTE)]
            x, value = line["x"].to_numpy(), line["value"].to_numpy()
            error = 1.96 * np.nan_to_num(line["stderr"].to_numpy())
            axes.fill_between(x, value - error, value + error, color=colour, alpha=0.22, lw=0)
            axes.plot(
                x,
                value,
                color=colour,
                marker=_MARKERS[index % len(_MARKERS)] if len(x) <= 40 else None,
                markersize=4,
                linewidth=1.6,
                label=label,
            )
            low, high = min(low, np.min(value - error)), max(high, np.max(value + error))
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("pretraining step" if with_steps else "checkpoint (place in the list)")
        axes.set_ylabel(f"{title.lower()} ({unit})" if unit else title.lower())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        bound = bounds.copy().pop() if len(bounds) == 1 else None
        if measure == "knowledge_entropy" and bound is not None:
            near = bound.nats - high <= 2.0 * max(high - low, 1e-9)
            if near:
                axes.axhline(bound.nats, color="#555555", linestyle="--", linewidth=1)
            axes.set_title(str(bound), fontsize=8, loc="right", color="#555555")
        if len(curves) > 1 and place == 0:
            axes.legend(frameon=False, fontsize=8)
    failed = series.failed(scan)["checkpoint"].nunique()
    figure.suptitle(
        f"{scan.name}: {len(series.checkpoints(scan))} checkpoints"
        + (f", {failed} failed" if failed else "")
        + "; bands ±1.96 jackknife standard errors",
        fontsize=9,
        color="#555555",
    )
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": _MADE_BY})
    return buffer.getvalue()
