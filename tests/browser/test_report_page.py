"""The report in a real browser: drawn, operable, readable."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from PIL import Image

from ke_ray.report.build import build_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("report") / "report.html"
    build_report([demo_folder], target)
    return target.as_uri()


def _pixels(element: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


def _near(pixels: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(-1) < 12).sum())


@pytest.mark.parametrize("width", [1280, 420])
def test_every_figure_is_drawn_offline(address: str, open_page: Callable, width: int) -> None:
    page = open_page(address, width=width, offline=True)
    drawn = page.evaluate(
        """() => [...document.querySelectorAll("figure")].map((figure) => {
            const svg = [...figure.querySelectorAll("svg")].filter((s) => s.clientWidth > 0);
            const boxes = svg.flatMap((s) => [...s.querySelectorAll(".series, .cells")])
                .map((shape) => shape.getBoundingClientRect());
            return [figure.id, svg.length, Math.max(...boxes.map((b) => b.width)),
                Math.max(...boxes.map((b) => b.height)), svg[0].clientWidth];
        })"""
    )
    assert len(drawn) >= 20
    for name, shown, across, down, size in drawn:
        assert shown == 1, name
        assert across > size * 0.3, name
        assert down > 10, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_lines_have_their_colours_on_the_screen(address: str, open_page: Callable) -> None:
    for dark, colours in ((False, ("#0072b2", "#d55e00")), (True, ("#56b4e9", "#f08a3c"))):
        page = open_page(address, dark=dark)
        pixels = _pixels(page.locator("#scan-knowledge-entropy .panel"))
        assert all(_near(pixels, colour) > 150 for colour in colours)


def test_text_is_readable_in_dark_and_light(address: str, open_page: Callable) -> None:
    ratio = """() => {
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const paper = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
        return ["figcaption", "svg .tick", "svg .title", "h3", "svg .hint"].map((name) => {
            const node = document.querySelector(name), style = getComputedStyle(node);
            const ink = light(name.startsWith("svg") ? style.fill : style.color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }); }"""
    for dark in (False, True):
        assert min(open_page(address, dark=dark).evaluate(ratio)) >= 4.5


def test_the_colour_button_goes_round(address: str, open_page: Callable) -> None:
    page = open_page(address)
    button = page.locator("#theme")
    seen = []
    for _ in range(3):
        button.click()
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert seen[0] == "rgb(255, 255, 255)"
    assert seen[1] == "rgb(20, 23, 27)"
    assert "system" in button.inner_text()


def test_controls_change_what_is_shown(address: str, open_page: Callable) -> None:
    page = open_page(address)
    figure = page.locator("#scan-layers")
    before = figure.locator("svg:visible .line").first.get_attribute("d")
    figure.get_by_label("measure").select_option("Gini coefficient")
    assert "gini coefficient" in figure.locator("svg:visible").text_content()
    assert figure.locator("svg:visible .line").first.get_attribute("d") != before
    figure.get_by_label("measure").select_option("Knowledge entropy")
    assert figure.locator("svg:visible .line").first.get_attribute("d") == before


def test_a_log_axis_spreads_early_steps(address: str, open_page: Callable) -> None:
    page = open_page(address)
    figure = page.locator("#scan-knowledge-entropy")

    def second_point() -> float:
        path = figure.locator("svg:visible .line").first.get_attribute("d")
        return float(re.findall(r"[ML]([\d.]+) ", path)[1])

    linear = second_point()
    figure.get_by_label("x axis").select_option("log steps")
    assert second_point() > linear + 50


def test_numbers_and_exports_hold_what_is_drawn(
    address: str, open_page: Callable, tmp_path: Path
) -> None:
    page = open_page(address)
    figure = page.locator("#scan-knowledge-entropy")
    figure.locator("summary", has_text="Numbers").click()
    rows = figure.locator(".numbers tbody tr")
    rows.first.wait_for()
    assert rows.count() == 16
    with page.expect_download() as got:
        figure.get_by_role("button", name="CSV").click()
    got.value.save_as(tmp_path / "f.csv")
    read = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert [row["series"] for row in read] == ["biographies"] * 8 + ["held_out"] * 8
    assert float(read[0]["knowledge entropy (nats)"]) > float(read[7]["knowledge entropy (nats)"])
    with page.expect_download() as got:
        figure.get_by_role("button", name="SVG").click()
    got.value.save_as(tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    ElementTree.fromstring(text)
    assert "var(" not in text
    assert "rgb(0, 114, 178)" in text
    with page.expect_download() as got:
        figure.get_by_role("button", name="PNG").click()
    got.value.save_as(tmp_path / "f.png")
    image = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    assert image.shape[1] == 1200
    assert _near(image, "#0072b2") > 300


def test_everything_is_reached_and_worked_by_keyboard(address: str, open_page: Callable) -> None:
    page = open_page(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "BUTTON", "SUMMARY", "DIV", "SELECT"} <= reached
    plots = page.locator("#scan-knowledge-entropy .plots")
    plots.focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("ArrowRight")
    readout = page.locator("#scan-knowledge-entropy .readout")
    first = readout.inner_text()
    assert first.startswith("biographies · step0: pretraining step 0, knowledge entropy (nats) ")
    page.keyboard.press("ArrowRight")
    assert "step10" in readout.inner_text()
    assert outline != "none"
    page.locator("#scan-layer-map select").first.focus()
    page.keyboard.press("ArrowDown")
    assert "Attention" in page.locator("#scan-layer-map select").first.input_value()


def test_pointing_reads_out_a_value(address: str, open_page: Callable) -> None:
    page = open_page(address)
    svg = page.locator("#scan-layer-map svg:visible")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.6)
    assert "layer" in page.locator("#scan-layer-map .readout").inner_text()
    assert svg.locator(".cursor").count() == 1


@pytest.mark.slow
def test_a_scan_of_351_checkpoints_and_32_layers_answers(
    open_page: Callable, tmp_path: Path
) -> None:
    steps = [1000 * (place + 1) for place in range(351)]
    synthetic.make_scan(
        tmp_path / "scan", steps=steps, n_layers=32, corpora=("dolma",), num_instances=4
    )
    build_report([tmp_path / "scan"], tmp_path / "report.html")
    page = open_page((tmp_path / "report.html").as_uri())
    figure = page.locator("#scan-layers")
    assert figure.locator("svg:visible .line").count() == 32
    figure.get_by_label("measure").select_option("Gini coefficient")
    assert "gini" in figure.locator("svg:visible").text_content()
    figure.locator("summary", has_text="Numbers").click()
    figure.locator(".numbers tbody tr").nth(350).wait_for()
    assert figure.locator(".numbers tbody tr").count() == 351
    page.locator("#scan-layer-map .plots").focus()
    page.keyboard.press("ArrowRight")
    assert "layer 0" in page.locator("#scan-layer-map .readout").inner_text()
