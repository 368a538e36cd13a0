"""The view of scans: any measure, corpus, layer and checkpoint of several scans at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pandas as pd
import streamlit as st
from parts import chart, pick, plain

from ke_ray.report import series
from ke_ray.report.charts import comparison
from ke_ray.report.charts.plot import X, heat_map, series_plot
from ke_ray.report.charts.scan import (
    axes,
    band_caption,
    layer_rows,
    measure_axis,
    measure_rows,
    x_title,
)
from ke_ray.report.sources import Result


@dataclass(frozen=True)
class Menus:
    """What is chosen in the side bar."""

    scans: list[str]
    measure: str | None
    corpora: list[str]
    layers: list[int]
    relative: bool
    axis: str
    limits: tuple[float, float] | None


def _titles(scans: list[Result], measure: str) -> tuple[str, str]:
    """Titles of a measure and of its axis, by the first of the scans that has it."""
    return measure_axis(next(s for s in scans if measure in series.measures(s)), measure)


def scan_menus(results: list[Result]) -> Menus:
    """The side bar of this view."""
    paths = pick(results, "scan", "Scans")
    scans = [r for r in results if r.path in paths]
    measures = list(dict.fromkeys(m for scan in scans for m in series.measures(scan)))
    corpora = list(dict.fromkeys(c for scan in scans for c in series.corpora(scan)))
    n_layers = max((series.num_layers(scan) for scan in scans), default=0)
    steps = sorted({float(x) for scan in scans for x in series.checkpoints(scan)["x"]})
    side = st.sidebar
    measure = side.selectbox("Measure", measures, format_func=lambda name: _titles(scans, name)[0])
    shown = side.multiselect("Corpora", corpora, default=corpora)
    layers = side.multiselect("Layers (none: the whole model)", list(range(n_layers)))
    relative = side.toggle("Change since the first checkpoint")
    axis = side.selectbox("Horizontal axis", list(_shared_axes(scans)))
    limits = None
    if not side.toggle("All checkpoints, also those to come", value=True) and len(steps) > 1:
        limits = side.select_slider(
            "Checkpoints", steps, value=(steps[0], steps[-1]), format_func=lambda x: f"{x:g}"
        )
    return Menus(paths, measure, shown, layers, relative, axis or "linear steps", limits)


def _shared_axes(scans: list[Result]) -> dict[str, X]:
    """The horizontal axes that all scans have; a title names all that they count."""
    offers = [axes(scan) for scan in scans]
    names = [name for name in (offers[0] if offers else {}) if all(name in o for o in offers)]
    return {
        name: X(
            offers[0][name].field,
            " or ".join(dict.fromkeys(offer[name].title for offer in offers)),
            log=offers[0][name].log,
        )
        for name in names
    }


def _rows(scan: Result, menus: Menus, name: str) -> pd.DataFrame:
    """What is drawn of one scan; ``name`` distinguishes it from others."""
    measure = menus.measure
    if not menus.layers:
        values = series.paired_change if menus.relative else series.totals
        rows = measure_rows(scan, measure, values)
        rows = rows[rows["corpus"].isin(menus.corpora)]
        rows = rows.assign(series=name + rows["series"])
    else:
        parts = []
        for (curve_label, curve), corpus in itertools.product(series.curves(scan), menus.corpora):
            own = layer_rows(curve, measure, corpus)
            own = own[own["layer"].isin(menus.layers)]
            of_curve = f"{curve_label}: " if curve_label else ""
            label = f"{name}{of_curve}{corpus}, layer " + own["layer"].astype(str)
            value = own["change"] if menus.relative else own["value"]
            parts.append(own.assign(series=label, value=value))
        rows = pd.concat(parts) if parts else layer_rows(scan, measure, "")
    return rows if menus.limits is None else rows[rows["x"].between(*menus.limits)]


def show_scans(results: list[Result], menus: Menus) -> None:
    """Lines, layer maps, paired comparisons and failures of the chosen scans."""
    scans = [r for r in results if r.path in menus.scans and series.measures(r)]
    if not scans or menus.measure is None:
        st.info(
            "No scan is chosen, or none has a scored checkpoint yet. Make one with "
            "`ke-ray scan CHECKPOINTS --data DATA --output DIR`, or all with `ke-ray demo`."
        )
        return
    for text in comparison.warnings(scans):
        st.warning(plain(text))
    names = comparison.labels(scans)
    tiles = st.columns(min(4, 1 + len(scans)))
    for scan, tile in zip(scans, tiles, strict=False):
        planned = f" of {scan.planned}" if scan.planned else ""
        scored = len(series.checkpoints(scan))
        tile.metric(plain(f"{names[scan.path]}: checkpoints"), f"{scored}{planned}")
        broken = series.failed(scan)["checkpoint"].nunique()
        if broken:
            tile.caption(f"{broken} failed")
    title, axis = _titles(scans, menus.measure)
    axis = f"change of {axis}" if menus.relative else axis
    st.subheader(plain(title), anchor=False)
    rows = pd.concat(
        [_rows(scan, menus, f"{names[scan.path]}: " if len(scans) > 1 else "") for scan in scans],
        ignore_index=True,
    )
    if rows.empty:
        st.info("Nothing of these scans fits the menus.")
    else:
        offered = _shared_axes(scans)
        x = offered.get(menus.axis, next(iter(offered.values())))
        plot = series_plot(rows, x, axis, columns={"checkpoint": "checkpoint"})
        chart(plot, "scan-lines")
        if "low" in rows:
            of = " of the paired difference" if menus.relative else ""
            st.caption(plain(band_caption(rows, f"jackknife standard errors{of}")))
        with st.expander("Numbers"):
            table = rows[list(plot.columns)].rename(columns=plot.columns)
            st.dataframe(table, hide_index=True)
            st.download_button("Download CSV", table.to_csv(index=False), "scan.csv", "text/csv")
    for scan in scans:
        _scan_details(scan, menus, names[scan.path])


def _scan_details(scan: Result, menus: Menus, name: str) -> None:
    measure = menus.measure
    for (label, curve), corpus in itertools.product(series.curves(scan), menus.corpora):
        rows = layer_rows(curve, measure, corpus)
        if rows.empty:
            continue
        heading = ", ".join(part for part in (name, label, corpus) if part)
        st.subheader(plain(f"Layer × checkpoint: {heading}"), anchor=False)
        plot = heat_map(
            rows,
            X("at", x_title(scan)),
            X("layer", "layer"),
            series.declared(scan, measure)[1],
            value="change" if menus.relative else "value",
            diverging=menus.relative,
            columns={"checkpoint": "checkpoint"},
        )
        chart(plot, f"heat-{scan.path}-{label}-{corpus}")
    names = series.checkpoints(scan)["checkpoint"].to_list()
    if len(names) > 1:
        with st.expander(plain(f"Compare two checkpoints of {name}")):
            left, right = st.columns(2)
            one = left.selectbox("From", names, index=0, key=f"from-{scan.path}")
            other = right.selectbox("To", names, index=len(names) - 1, key=f"to-{scan.path}")
            st.dataframe(_differences(scan, one, other), hide_index=True)
    broken = series.failed(scan)
    if len(broken):
        st.subheader(plain(f"Failed checkpoints of {name}"), anchor=False)
        st.dataframe(broken, hide_index=True)
    for note in scan.notes:
        st.caption(plain(f"{name}: {note}"))


def _differences(scan: Result, one: str, other: str) -> pd.DataFrame:
    rows = []
    for corpus in series.corpora(scan):
        for measure in series.measures(scan):
            frame = series.paired_change(scan, measure, corpus, base=one)
            row = frame[frame["checkpoint"] == other]
            if len(row):
                unit = series.declared(scan, measure)[1]
                value, error = row["value"].iloc[0], row["stderr"].iloc[0]
                rows.append([corpus, measure, unit, value, error])
    columns = ["corpus", "measure", "unit", "difference", "paired standard error"]
    return pd.DataFrame(rows, columns=columns)
