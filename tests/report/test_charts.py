"""Charts: one description with the rows that it draws, in every theme, for page and picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
import vl_convert

from ke_ray.report.build import sections
from ke_ray.report.charts.figure import Plot, number
from ke_ray.report.charts.plot import Rule, X, heat_map, series_plot
from ke_ray.report.charts.scan import axes
from ke_ray.report.charts.theme import DIVERGING, ORDERED, PALETTES, config
from ke_ray.report.sources import find_results


def _rows(**columns: object) -> pd.DataFrame:
    rows = pd.DataFrame({"series": "a", "x": [0.0, 5.0, 10.0], "value": [1.0, 3.0, 2.0]})
    return rows.assign(**columns)


def _drawn(plot: Plot, theme: str = "light") -> dict:
    """What Vega draws: its scene graph."""
    chart = plot.themed(theme).properties(width=400)
    return vl_convert.vegalite_to_scenegraph(chart.to_dict())


def _marks(plot: Plot, kind: str) -> list[dict]:
    """Items of a kind of mark that carry data, anywhere in the scene graph."""
    found: list[dict] = []

    def walk(node: dict) -> None:
        if node.get("marktype") == kind and node.get("role") == "mark":
            found.extend(node.get("items", []))
        for item in node.get("items", []):
            walk(item)

    walk(_drawn(plot)["scenegraph"])
    return found


def test_every_chart_of_the_demo_compiles_and_names_its_rows(demo_folder: Path) -> None:
    figures = [f for section in sections(find_results([demo_folder])) for f in section.figures]
    plots = [p.view for figure in figures for p in figure.panels if isinstance(p.view, Plot)]
    assert len(figures) >= 25
    for plot in plots:
        spec = plot.spec()
        assert spec["data"] == {"name": "rows"}
        assert not any(layer.get("data") == {"name": "empty"} for layer in spec["layer"])
        assert set(plot.columns) <= set(plot.rows)
        vl_convert.vegalite_to_vega(spec | {"datasets": {"rows": []}})


def test_points_lie_where_their_values_say() -> None:
    points = _marks(series_plot(_rows(), X("x", "step"), "nats"), "symbol")
    left, middle, right = sorted(points[:3], key=lambda item: item["x"])
    assert middle["x"] - left["x"] == pytest.approx(right["x"] - middle["x"])
    assert middle["y"] < right["y"] < left["y"]  # 3, 2 and 1, from the top


def test_an_unknown_value_breaks_the_line() -> None:
    plot = series_plot(_rows(value=[1.0, np.nan, 2.0]), X("x", "x"), "y")
    defined = [item.get("defined", True) for item in _marks(plot, "line")]
    assert defined == [True, False, True]


def test_errors_are_bands_or_bars_where_they_are_known() -> None:
    ends = {"low": [0.5, np.nan, 1.5], "high": [1.5, np.nan, 2.5]}
    band = series_plot(_rows(**ends), X("x", "x"), "y")
    assert "low (95 %)" in band.columns.values()
    assert len(_marks(band, "area")) == 3
    bars = series_plot(_rows(**ends), X("x", "x"), "y", bars=True)
    tall = [item for item in _marks(bars, "rule") if abs(item.get("y2", 0) - item["y"]) > 5]
    assert len(tall) == 2
    none = series_plot(_rows(low=np.nan, high=np.nan), X("x", "x"), "y")
    assert "low" not in none.columns
    assert _marks(none, "area") == []


def _many_layers() -> Plot:
    steps = np.arange(300)
    layers = [
        pd.DataFrame({"layer": layer, "x": steps, "value": 1000.0 * layer + steps})
        for layer in range(4)
    ]
    rows = pd.concat(layers, ignore_index=True)
    rows["checkpoint"] = "step" + rows["x"].astype(str)
    columns = {"checkpoint": "checkpoint"}
    return series_plot(rows, X("x", "step"), "nats", columns=columns, colour="layer")


def test_pointing_at_many_values_takes_one_mark_per_x_that_lists_them_all() -> None:
    plot = _many_layers()
    assert _marks(plot, "symbol") == []
    rules = _marks(plot, "rule")
    assert len(rules) == 300
    headings = [field["title"] for field in plot.spec()["layer"][-1]["encoding"]["tooltip"]]
    assert headings == ["checkpoint", "step", "layer 0", "layer 1", "layer 2", "layer 3"]


def test_values_with_errors_are_pointed_at_one_by_one_however_many() -> None:
    rows = _many_layers().rows.assign(low=0.0, high=1.0)
    plot = series_plot(rows, X("x", "step"), "nats", colour="layer")
    assert len(_marks(plot, "symbol")) == 1200
    headings = [field["title"] for field in plot.spec()["layer"][-1]["encoding"]["tooltip"]]
    assert headings[-2:] == ["low (95 %)", "high (95 %)"]


def test_only_marks_that_a_page_can_name_get_names() -> None:
    many = _many_layers()
    assert many.spec()["usermeta"]["embedOptions"]["renderer"] == "canvas"
    assert all("description" not in item for item in _marks(many, "line"))
    few = series_plot(_rows(), X("x", "step"), "nats")
    assert few.spec()["usermeta"]["embedOptions"]["renderer"] == "svg"
    assert "step: 5" in _marks(few, "symbol")[1]["description"]


def test_bars_of_two_series_at_one_place_stand_beside_each_other() -> None:
    ends = {"low": [0.5, 2.5, 1.5], "high": [1.5, 3.5, 2.5]}
    rows = pd.concat([_rows(**ends), _rows(**ends, series="b")], ignore_index=True)
    xs = [
        round(item["x"], 1) for item in _marks(series_plot(rows, X("x", ""), "", bars=True), "rule")
    ]
    assert len(set(xs)) == 6


def test_series_differ_in_colour_dash_and_marker() -> None:
    rows = pd.concat([_rows(), _rows(series="b")], ignore_index=True)
    points = _marks(series_plot(rows, X("x", "x"), "y"), "symbol")[:6]
    assert {item["fill"] for item in points} == set(PALETTES["light"][:2])
    assert {item["shape"] for item in points} == {"circle", "square"}
    lines = _marks(series_plot(rows, X("x", "x"), "y"), "line")
    assert {str(item.get("strokeDash")) for item in lines} == {"[1, 0]", "[6, 4]"}


def test_log_steps_allow_zero_and_spread_early_ones() -> None:
    rows = _rows(x=[0.0, 10.0, 1000.0])
    xs = sorted(
        {
            round(item["x"])
            for item in _marks(series_plot(rows, X("x", "step", log=True), "y"), "symbol")[:3]
        }
    )
    assert xs[1] - xs[0] > 0.1 * (xs[2] - xs[0])


def test_rules_are_drawn_with_their_words() -> None:
    plot = series_plot(_rows(), X("x", "x"), "y", rules=[Rule("y", 4.0, "ceiling 4")])
    assert "ceiling 4" in [item["text"] for item in _marks(plot, "text")]


def test_a_heat_map_has_a_cell_per_row_and_leaves_unknown_ones_empty() -> None:
    rows = pd.DataFrame({"x": ["0", "1"] * 2, "y": ["0", "0", "1", "1"]})
    rows["value"] = [1.0, np.nan, 2.0, 3.0]
    plot = heat_map(rows, X("x", "x"), X("y", "layer"), "nats", write_values=True)
    fills = [item.get("fill") for item in _marks(plot, "rect")]
    assert len(set(fills)) >= 3
    written = [item["text"] for item in _marks(plot, "text")]
    assert {"1", "2", "3"} <= set(written)


def test_zero_is_the_pale_middle_of_a_change() -> None:
    rows = pd.DataFrame({"x": list("abc"), "y": "0", "value": [-4.0, 0.0, 1.0]})
    plot = heat_map(rows, X("x", "x"), X("y", "y"), "nats", diverging=True)
    fills = [item["fill"] for item in _marks(plot, "rect")]
    pale = [int(DIVERGING[3][i : i + 2], 16) for i in (1, 3, 5)]
    assert fills[1] in (DIVERGING[3], f"rgb({', '.join(map(str, pale))})")


def test_tokens_are_an_axis_where_all_are_known(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", steps=[1, 10, 100], corpora=("a",))
    assert list(axes(find_results([folder])[0])) == ["linear steps", "log steps"]
    path = folder / "manifest.json"
    entries = [{"name": f"step{s}", "pretraining_tokens": s * 4_000_000} for s in (1, 10, 100)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoints": entries}))
    scan = find_results([folder])[0]
    assert list(axes(scan)) == ["linear steps", "log steps", "tokens", "log tokens"]
    figure = next(f for f in sections([scan])[0].figures if f.id == "scan-knowledge-entropy")
    tokens = figure.panels[2].view
    assert tokens.columns["tokens"] == "pretraining tokens"
    assert tokens.rows["tokens"].tolist() == [4e6, 4e7, 4e8]


def test_numbers_are_read_with_six_digits() -> None:
    assert number(143.98123) == "143.981"
    assert number(738020.0) == "738,020"
    assert number(-0.5) == "−0.5"
    assert number(float("nan")) == "–"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_words_stand_out_from_their_background(theme: str) -> None:
    paper = _luminance(config(theme)["background"])

    def contrast(colour: str) -> float:
        other = _luminance(colour)
        return (max(other, paper) + 0.05) / (min(other, paper) + 0.05)

    assert min(contrast(colour) for colour in (*PALETTES[theme], *ORDERED)) >= 3.0
    assert contrast(config(theme)["axis"]["labelColor"]) >= 4.5
    assert contrast(config(theme)["axis"]["titleColor"]) >= 4.5


def test_ramps_grow_lighter_or_diverge() -> None:
    steps = [_luminance(colour) for colour in config("light")["range"]["heatmap"]]
    assert steps == sorted(steps)
    diverging = [_luminance(colour) for colour in DIVERGING]
    assert diverging.index(max(diverging)) == 3


def test_the_terms_of_knowledge_entropy_are_drawn_beside_it(tmp_path: Path) -> None:
    folder = synthetic.make_scan(tmp_path / "scan", corpora=("d",))
    for name in ("entropy", "replicates"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        own = table[table["measure"] == "knowledge_entropy"]
        for measure, share in (("token_entropy", 0.7), ("memory_information", 0.3)):
            table = pd.concat([table, own.assign(measure=measure, value=share * own["value"])])
        table.to_parquet(folder / f"{name}.parquet")
    parts = sections(find_results([folder]))
    figures = {figure.id: figure for part in parts for figure in part.figures}
    assert {"scan-token-entropy", "scan-memory-information"} <= set(figures)
    assert "Sum over layers." in figures["scan-token-entropy"].caption
    panels = {panel.key[0]: panel.view for panel in figures["scan-changes"].panels}
    rows = panels["Knowledge entropy and its two terms"].rows
    assert rows["series"].nunique() == 3
    by_term = rows.pivot_table(index="x", columns="series", values="value")
    whole = by_term.pop("d: knowledge entropy")
    np.testing.assert_allclose(by_term.sum(axis=1), whole, atol=1e-9)
    assert (rows["low"] < rows["value"])[rows["x"] > 0].all()
