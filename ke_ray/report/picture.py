"""A picture of a scan without a browser: the entropies over pretraining, as PNG."""

from __future__ import annotations

import os
import struct
import zlib

import altair as alt

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.report import series
from ke_ray.report.charts.scan import axes, band_caption, measure_axis, measure_plot, measure_rows
from ke_ray.report.charts.theme import config
from ke_ray.report.sources import Result, find_results
from ke_ray.storage.ownership import check_replaceable

_MARK = b"Software\0ke_ray"  # in the PNG's text: a picture that a later command may replace
_PANELS = ("knowledge_entropy", "attention_entropy", "next_token_entropy")
_PANEL_WIDTH = 350  # px, before scaling


def picture(scan_folder: str | os.PathLike[str], output_png: str | os.PathLike[str]) -> str:
    """Draw knowledge, attention and next-token entropy over pretraining steps.

    Totals in nats, one line per corpus, bands of 95 % by jackknife errors: the charts of the
    report side by side. Only measures that the scan holds get a panel.

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
    check_replaceable(target, _MARK, "entropy.png")
    scans = [result for result in find_results([scan_folder]) if result.kind == "scan"]
    if len(scans) != 1:
        raise ResultsError(
            f"'{os.fspath(scan_folder)}' holds {len(scans)} scans; one is needed for a picture. "
            "Give the output folder of 'ke-ray scan'."
        )
    scan = scans[0]
    measures = series.measures(scan)
    shown = [name for name in _PANELS if name in measures] or measures[:3]
    if not shown:
        raise ResultsError(
            f"The scan '{scan.path}' has no scored checkpoint yet, so there is nothing to draw."
        )
    storage.write_atomic(target, draw_png(_side_by_side(scan, shown)))
    return target


def draw_png(chart: alt.TopLevelMixin) -> bytes:
    """A chart with its rows as PNG, drawn by vl-convert."""
    import vl_convert

    return _marked(bytes(vl_convert.vegalite_to_png(_spec(chart), scale=1.15)))


def _marked(png: bytes) -> bytes:
    """The picture with our name in a tEXt chunk, by which a later command knows it as ours."""
    text = b"tEXt" + _MARK
    chunk = struct.pack(">I", len(_MARK)) + text + struct.pack(">I", zlib.crc32(text))
    header_end = 8 + 12 + 13  # signature, then IHDR: length, type and checksum around 13 bytes
    return png[:header_end] + chunk + png[header_end:]


def _spec(chart: alt.TopLevelMixin) -> dict[str, object]:
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, object] = chart.to_dict()
    return spec


def _side_by_side(scan: Result, shown: list[str]) -> alt.HConcatChart:
    x = next(iter(axes(scan).values()))
    charts = []
    for measure in shown:
        plot = measure_plot(scan, measure, measure_rows(scan, measure), x, interactive=False)
        chart = plot.chart.copy(deep=False).properties(
            data=plot.rows, width=_PANEL_WIDTH, title=measure_axis(scan, measure)[0]
        )
        charts.append(chart)
    failed = series.failed(scan)["checkpoint"].nunique()
    title = f"{scan.name}: {len(series.checkpoints(scan))} checkpoints"
    title += f", {failed} failed. " if failed else ". "
    title += band_caption(measure_rows(scan, shown[0]), "jackknife")
    picture = alt.hconcat(*charts, title=title).resolve_scale(
        color="independent", shape="independent", strokeDash="independent"
    )
    picture.config = alt.Config(**config("light"))
    return picture
