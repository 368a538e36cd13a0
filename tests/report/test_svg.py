"""Drawing: what is in a chart is on the picture, at the right place."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ke_ray.report.charts import Chart, HeatMap, Line, Mark
from ke_ray.report.scales import Scale, diverging, number, ordered, sequential, short, ticks
from ke_ray.report.svg import draw


def test_points_lie_where_the_scale_says() -> None:
    chart = Chart("step", "value (nats)", [Line("a", [0, 5, 10], [1.0, 3.0, 2.0])])
    svg = draw(chart, 600, "a figure")
    scale = json.loads(ElementTree.fromstring(svg).attrib["data-scale"])
    x = Scale(*scale["x"][:4], scale["x"][4])
    y = Scale(*scale["y"][:4])
    path = re.search(r'class="line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)', svg)
    assert path is not None
    drawn = [float(value) for value in path.groups()]
    expected = [x.pixel(0), y.pixel(1.0), x.pixel(5), y.pixel(3.0)]
    assert drawn == pytest.approx(expected, abs=0.1)
    assert y.pixel(3.0) < y.pixel(2.0) < y.pixel(1.0)


def test_gaps_break_the_line_and_unknown_errors_draw_no_band() -> None:
    nan = float("nan")
    line = Line("a", [0, 1, 2, 3], [1, nan, 2, 3], [nan] * 4, [nan] * 4)
    svg = draw(Chart("x", "y", [line]), 360, "f")
    assert svg.count("M") == 2 + svg.count('class="axis" d="M')
    assert 'class="band"' not in svg
    assert "nan" not in svg


@pytest.mark.parametrize("width", [360, 600, 1120])
def test_every_svg_is_well_formed_and_inside_its_width(width: int) -> None:
    rng = np.random.default_rng(0)
    x = np.array([0, 10, 100, 1000.0])
    lines = [
        Line(f"a rather long series name {i}", x, rng.normal(size=4), colour=i, dash=i)
        for i in range(6)
    ]
    chart = Chart("steps & <tokens>", "y", lines, [Mark("x", 10.0), Mark("y", 0.0, "zero")], True)
    heat = HeatMap(
        "step", "layer", "nats", rng.normal(size=(4, 9)), list("abcdefghi"), list("0123")
    )
    for picture in (chart, heat):
        root = ElementTree.fromstring(draw(picture, width, 'label "quoted" <b>'))
        starts = [float(node.attrib["x"]) for node in root.iter() if node.tag.endswith("text")]
        assert starts
        assert max(starts) <= width


def test_a_heat_map_keeps_unknown_cells_empty() -> None:
    values = np.array([[1.0, np.nan], [2.0, 3.0]])
    chart = HeatMap("x", "y", "nats", values, ["0", "1"], ["0", "1"], write_values=True)
    svg = draw(chart, 360, "f")
    assert len(re.findall(r'class="on-(?:dark|light)"', svg)) == 3
    assert chart.data()["values"] == [[1.0, None], [2.0, 3.0]]


def test_log_steps_allow_zero() -> None:
    scale = Scale(0, 1000, 10, 310, reference=1)
    assert scale.pixel(0) == 10
    assert scale.pixel(1000) == 310
    gaps = np.diff([scale.pixel(v) for v in (10, 100, 1000)])
    assert gaps[0] == pytest.approx(gaps[1], rel=0.05)
    assert scale.ticks(6)[0] == 0


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(143.6, 144.0, 4) == pytest.approx([143.6, 143.7, 143.8, 143.9, 144.0])
    assert [short(v, 0.1) for v in (143.6, 143.7)] == ["143.6", "143.7"]
    assert short(738000, 1000) == "738k"
    assert short(1_500_000, 500_000) == "1.5M"
    assert short(-0.5, 0.5) == "−0.5"
    assert number(143.98123) == "143.981"
    assert number(float("nan")) == "–"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_lines_of_a_ramp_stand_out_in_light_and_dark() -> None:
    dark_paper = _luminance("#1b1f25")
    for share in np.linspace(0, 1, 21):
        light = _luminance(ordered(share))
        assert 1.05 / (light + 0.05) >= 3.0
        assert (light + 0.05) / (dark_paper + 0.05) >= 3.0


def test_ramps_grow_lighter_or_diverge() -> None:
    steps = [_luminance(sequential(s)) for s in np.linspace(0, 1, 9)]
    assert steps == sorted(steps)
    middle = _luminance(diverging(0.5))
    assert middle > max(_luminance(diverging(0)), _luminance(diverging(1)))
