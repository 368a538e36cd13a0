"""The view of scans: any measure, corpus, layer and checkpoint of several scans at once."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import streamlit as st
from parts import chart, name_of, pick

from ke_ray.report import compare, series
from ke_ray.report.charts import Chart, HeatMap, Line
from ke_ray.report.sources import Result

__all__ = ["scan_menus", "show_scans"]


@dataclass(frozen=True)
class Menus:
    """What the side bar asks for."""

    scans: list[str]
    measure: str | None
    corpora: list[str]
    layers: list[int]
    relative: bool
    log: bool
    limits: tuple[float, float] | None


def scan_menus(results: list[Result]) -> Menus:
    """The side bar of this view."""
    chosen = pick(results, "scan", "Scans")
    scans = [r for r in results if r.kind == "scan" and name_of(r) in chosen]
    held = list(dict.fromkeys(m for scan in scans for m in series.measures(scan)))
    corpora = list(dict.fromkeys(c for scan in scans for c in series.corpora(scan)))
    n_layers = max((series.num_layers(scan) for scan in scans), default=0)
    steps = sorted({float(x) for scan in scans for x in series.checkpoints(scan)["x"]})
    side = st.sidebar
    measure = side.selectbox(
        "Measure", held, format_func=lambda name: series.MEASURE_TITLES.get(name, (name,))[0]
    )
    shown = side.multiselect("Corpora", corpora, default=corpora)
    layers = side.multiselect("Layers (none: the whole model)", list(range(n_layers)))
    relative = side.toggle("Change since the first checkpoint")
    log = side.toggle("Logarithmic steps (without step 0)")
    limits = None
    if not side.toggle("All checkpoints, also those to come", value=True) and len(steps) > 1:
        limits = side.select_slider(
            "Checkpoints", steps, value=(steps[0], steps[-1]), format_func=lambda x: f"{x:g}"
        )
    return Menus(chosen, measure, shown, layers, relative, log, limits)


def _clip(frame: pd.DataFrame, limits: tuple[float, float] | None) -> pd.DataFrame:
    if limits is None:
        return frame
    return frame[frame["x"].between(*limits)]


def _scan_lines(scan: Result, menus: Menus, name: str, colour: int) -> list[Line]:
    measure, limits = menus.measure, menus.limits
    prefix = f"{name}: " if name else ""
    lines: list[Line] = []
    for corpus in menus.corpora:
        if corpus not in series.corpora(scan):
            continue
        layers = menus.layers
        if layers:
            order, matrix = series.layer_matrix(scan, measure, corpus)
            for layer in layers:
                if layer < len(matrix):
                    frame = order.assign(value=matrix[layer])
                    if menus.relative:
                        frame["value"] -= frame["value"].iloc[0]
                    frame = _clip(frame, limits)
                    name = f"{prefix}{corpus}, layer {layer}"
                    place = colour + len(lines)
                    lines.append(Line(name, frame["x"], frame["value"], colour=place, dash=place))
            continue
        made = series.paired_change if menus.relative else series.totals
        frame = _clip(made(scan, measure, corpus), limits)
        if frame.empty:
            continue
        y, error = frame["value"].to_numpy(), 1.96 * frame["stderr"].to_numpy()
        lines.append(
            Line(
                f"{prefix}{corpus}",
                frame["x"].to_numpy(),
                y,
                y - error,
                y + error,
                colour=colour + len(lines),
                labels=frame["checkpoint"].to_list(),
            )
        )
    return lines


def show_scans(results: list[Result], menus: Menus) -> None:
    """Lines, layer maps, paired comparisons and failures of the chosen scans."""
    scans = [r for r in results if r.kind == "scan" and name_of(r) in menus.scans]
    if not scans or menus.measure is None:
        st.info(
            "No scan is chosen, or none has a scored checkpoint yet. Make one with "
            "`ke-ray scan CHECKPOINTS --data DATA --output DIR`, or all with `ke-ray demo`."
        )
        return
    for text in compare.warnings(scans):
        st.warning(text)
    lines: list[Line] = []
    tiles = st.columns(min(4, 1 + len(scans)))
    for scan, tile in zip(scans, tiles, strict=False):
        done = len(series.checkpoints(scan))
        broken = series.failed(scan)["checkpoint"].nunique()
        planned = f" of {scan.planned}" if scan.planned else ""
        tile.metric(f"{name_of(scan)}: checkpoints", f"{done}{planned}")
        if broken:
            tile.caption(f"{broken} failed")
    curves = [
        (
            curve,
            ": ".join(part for part in (name_of(scan) if len(scans) > 1 else "", label) if part),
        )
        for scan in scans
        for label, curve in series.curves(scan)
    ]
    for curve, name in curves:
        lines += _scan_lines(curve, menus, name, len(lines))
    title, unit = series.MEASURE_TITLES.get(menus.measure, (menus.measure, ""))
    axis = ("change of " if menus.relative else "") + title.lower()
    st.subheader(title, anchor=False)
    chart(Chart("pretraining step", f"{axis} ({unit})", lines, log_x=menus.log), "scan-lines")
    st.caption("Bands: ±1.96 jackknife standard errors; of a change, of the paired difference.")
    rows = pd.DataFrame(
        [
            {"series": line.name, "step": x, "value": y}
            for line in lines
            for x, y in zip(line.x, line.y, strict=True)
        ]
    )
    with st.expander("Numbers"):
        st.dataframe(rows, hide_index=True)
        st.download_button("Download CSV", rows.to_csv(index=False), "scan.csv", "text/csv")
    for scan in scans:
        _scan_details(scan, menus)


def _scan_details(scan: Result, menus: Menus) -> None:
    measure = menus.measure
    curves = [(*part, corpus) for part in series.curves(scan) for corpus in menus.corpora]
    for label, curve, corpus in curves:
        order, matrix = series.layer_matrix(curve, measure, corpus)
        if len(matrix) and len(order):
            heading = ", ".join(part for part in (name_of(scan), label, corpus) if part)
            st.subheader(f"Layer × checkpoint: {heading}", anchor=False)
            unit = series.MEASURE_TITLES.get(measure, ("", ""))[1]
            values = matrix - matrix[:, :1] if menus.relative else matrix
            names = [f"{x:g}" for x in order["x"]]
            layers = [str(layer) for layer in range(len(matrix))]
            centre = 0.0 if menus.relative else None
            heat = HeatMap("pretraining step", "layer", unit, values, names, layers, centre)
            chart(heat, f"heat-{scan.path}-{label}-{corpus}")
    names = series.checkpoints(scan)["checkpoint"].to_list()
    if len(names) > 1:
        with st.expander(f"Compare two checkpoints of {name_of(scan)}"):
            left, right = st.columns(2)
            one = left.selectbox("From", names, index=0, key=f"from-{scan.path}")
            other = right.selectbox("To", names, index=len(names) - 1, key=f"to-{scan.path}")
            st.dataframe(_differences(scan, one, other), hide_index=True)
    broken = series.failed(scan)
    if len(broken):
        st.subheader(f"Failed checkpoints of {name_of(scan)}", anchor=False)
        st.dataframe(broken, hide_index=True)
    for note in scan.notes:
        st.caption(f"{name_of(scan)}: {note}")


def _differences(scan: Result, one: str, other: str) -> pd.DataFrame:
    rows = []
    for corpus in series.corpora(scan):
        for measure in series.measures(scan):
            frame = series.paired_change(scan, measure, corpus, base=one)
            found = frame[frame["checkpoint"] == other]
            if len(found):
                unit = series.MEASURE_TITLES.get(measure, ("", ""))[1]
                value, error = found["value"].iloc[0], found["stderr"].iloc[0]
                rows.append([corpus, measure, unit, value, error])
    columns = ["corpus", "measure", "unit", "difference", "paired standard error"]
    return pd.DataFrame(rows, columns=columns)
