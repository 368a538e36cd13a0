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
from ke_ray.report.screenshots import whole_report

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


def _shown(page: Any, name: str) -> Any:
    """A figure that has come into view and been drawn; pages draw nothing before that."""
    figure = page.locator(f"#{name}")
    figure.scroll_into_view_if_needed()
    page.locator(f"#{name}[data-drawn]").wait_for()
    return figure


def _choose(page: Any, figure: Any, label: str, choice: str) -> None:
    figure.get_by_label(label).select_option(choice)
    page.wait_for_function(
        "([id, choice]) => document.getElementById(id).dataset.drawn.includes(choice)",
        arg=[figure.get_attribute("id"), choice],
    )


@pytest.mark.parametrize("width", [1280, 420])
def test_every_figure_is_drawn_offline(address: str, open_page: Callable, width: int) -> None:
    page = open_page(address, width=width, offline=True)
    names = page.evaluate("[...document.querySelectorAll('figure')].map((figure) => figure.id)")
    assert len(names) >= 20
    for name in names:
        figure = _shown(page, name)
        across, down, room = figure.evaluate(
            """(figure) => {
                const marks = [...figure.querySelectorAll(".plot svg .mark-line path, "
                    + ".plot svg .mark-symbol path, .plot svg .mark-rect path")]
                    .map((node) => node.getBoundingClientRect()).filter((box) => box.width);
                const size = (low, high) => Math.max(...marks.map((box) => box[high]))
                    - Math.min(...marks.map((box) => box[low]));
                return [size("left", "right"), size("top", "bottom"),
                    figure.querySelector(".plot").clientWidth];
            }"""
        )
        assert across > room * 0.3, name
        assert down > 10, name
        assert figure.locator(".plot svg").bounding_box()["width"] <= room + 1, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_picture_of_the_whole_report_shows_every_figure(
    address: str, chromium: Any, tmp_path: Path
) -> None:
    target = whole_report(chromium, address, tmp_path / "report.png", 1280, "light")
    pixels = np.asarray(Image.open(target).convert("RGB")).astype(int)
    quarters = np.array_split(pixels, 4)
    assert all(_near(part, "#0072b2") > 300 for part in quarters)


def test_figures_are_drawn_one_after_the_other(address: str, open_page: Callable) -> None:
    page = open_page(address)
    # Wraps vegaEmbed as soon as the page has it, and counts the calls that have not returned yet.
    page.add_init_script(
        """window.most = 0;
        let embed, open = 0;
        Object.defineProperty(window, "vegaEmbed", {
            set: (value) => { embed = value; },
            get: () => async (...given) => {
                window.most = Math.max(window.most, ++open);
                try { return await embed(...given); } finally { open -= 1; }
            },
        });"""
    )
    page.reload()
    page.wait_for_function("document.querySelectorAll('[data-drawn]').length >= 4")
    assert page.evaluate("window.most") == 1


def test_lines_have_their_colours_on_the_screen(address: str, open_page: Callable) -> None:
    for dark, colours in ((False, ("#0072b2", "#d55e00")), (True, ("#56b4e9", "#f08a3c"))):
        page = open_page(address, dark=dark)
        pixels = _pixels(_shown(page, "scan-knowledge-entropy").locator(".plot"))
        assert all(_near(pixels, colour) > 150 for colour in colours)


def test_text_is_readable_in_dark_and_light(address: str, open_page: Callable) -> None:
    ratio = """() => {
        const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const paper = light(getComputedStyle(document.querySelector("figure")).backgroundColor);
        return ["figcaption", "h3", "#scan-changes .role-axis-label text",
                "#scan-changes .role-axis-title text"].map((name) => {
            const node = document.querySelector(name);
            const ink = light(name.includes("role") ? node.getAttribute("fill").replace(/^#/, "")
                .match(/../g).map((part) => parseInt(part, 16)).join(" ")
                : getComputedStyle(node).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }); }"""
    for dark in (False, True):
        page = open_page(address, dark=dark)
        _shown(page, "scan-changes")
        assert min(page.evaluate(ratio)) >= 4.5


def test_the_colour_button_goes_round(address: str, open_page: Callable) -> None:
    page = open_page(address)
    button = page.locator("#theme")
    seen = []
    for colour in ("#0072b2", "#56b4e9", "#0072b2"):
        button.click()
        seen.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator(f'#pretrain-loss .mark-line path[stroke="{colour}"]').wait_for()
    assert seen[0] == "rgb(255, 255, 255)"
    assert seen[1] == "rgb(20, 23, 27)"
    assert "system" in button.inner_text()


def test_controls_change_what_is_shown(address: str, open_page: Callable) -> None:
    page = open_page(address)
    figure = _shown(page, "scan-layers")
    line = figure.locator(".mark-line path").first
    before = line.get_attribute("d")
    _choose(page, figure, "measure", "Gini coefficient")
    assert "gini coefficient" in figure.locator(".plot svg").text_content()
    assert line.get_attribute("d") != before
    _choose(page, figure, "measure", "Knowledge entropy")
    assert line.get_attribute("d") == before


def test_a_log_axis_spreads_early_steps(address: str, open_page: Callable) -> None:
    page = open_page(address)
    figure = _shown(page, "scan-knowledge-entropy")

    def second_point() -> float:
        path = figure.locator(".mark-line path").first.get_attribute("d")
        return float(re.findall(r"[ML]([\d.]+),", path)[1])

    linear = second_point()
    _choose(page, figure, "x axis", "log steps")
    assert second_point() > linear + 50


def test_control_and_the_wheel_zoom_and_a_double_click_resets(
    address: str, open_page: Callable
) -> None:
    page = open_page(address)
    figure = _shown(page, "scan-knowledge-entropy")
    labels = """() => [...document.getElementById("scan-knowledge-entropy")
        .querySelectorAll(".role-axis-label text")].map((node) => node.textContent).sort().join()"""
    before = page.evaluate(labels)

    def place() -> tuple[float, float]:
        box = figure.locator(".plot svg").bounding_box()
        return box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5

    page.mouse.move(*place())
    page.mouse.wheel(0, -300)  # alone it scrolls the page
    page.wait_for_timeout(500)
    assert page.evaluate(labels) == before
    page.mouse.move(*place())
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function(f"(before) => ({labels})() !== before", arg=before)
    page.mouse.dblclick(*place())
    page.wait_for_function(f"(before) => ({labels})() === before", arg=before)


def test_marks_are_named_for_screen_readers(address: str, open_page: Callable) -> None:
    page = open_page(address)
    figure = _shown(page, "scan-knowledge-entropy")
    svg = figure.locator(".plot svg")
    described = figure.locator("[role=graphics-document]").first.get_attribute("aria-label")
    assert described.startswith("Knowledge entropy")
    names = svg.locator(".mark-symbol path[aria-label]").evaluate_all(
        "(nodes) => nodes.map((node) => node.getAttribute('aria-label'))"
    )
    assert sum("pretraining step: 640" in name and "biographies" in name for name in names) == 1


def test_numbers_and_exports_hold_what_is_drawn(
    address: str, open_page: Callable, tmp_path: Path
) -> None:
    page = open_page(address)
    figure = _shown(page, "scan-knowledge-entropy")
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
    assert "#0072b2" in text
    with page.expect_download() as got:
        figure.get_by_role("button", name="PNG").click()
    got.value.save_as(tmp_path / "f.png")
    image = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    assert image.shape[1] > 900
    assert _near(image, "#0072b2") > 300


def test_everything_is_reached_and_worked_by_keyboard(address: str, open_page: Callable) -> None:
    page = open_page(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "BUTTON", "SUMMARY", "DIV", "SELECT"} <= reached
    plot = _shown(page, "scan-knowledge-entropy").locator(".plot")
    plot.focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("ArrowRight")
    readout = page.locator("#scan-knowledge-entropy .readout")
    first = readout.inner_text()
    start = (
        "series: biographies, checkpoint: step0, pretraining step: 0, knowledge entropy (nats): "
    )
    assert first.startswith(start)
    assert "low (95 %)" in first
    page.keyboard.press("ArrowRight")
    assert "step10" in readout.inner_text()
    assert outline != "none"
    _shown(page, "scan-layer-map").locator("select").first.focus()
    page.keyboard.press("ArrowDown")
    assert "Attention" in page.locator("#scan-layer-map select").first.input_value()


def test_pointing_shows_the_nearest_value_with_its_error(address: str, open_page: Callable) -> None:
    page = open_page(address)
    svg = _shown(page, "scan-knowledge-entropy").locator(".plot svg")
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.6)
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] * 0.6)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    words = tip.inner_text()
    for heading in ("checkpoint", "knowledge entropy (nats)", "low (95 %)", "high (95 %)"):
        assert heading in words


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
    figure = _shown(page, "scan-layers")
    before = _pixels(figure.locator(".plot canvas"))
    _choose(page, figure, "measure", "Gini coefficient")
    assert (_pixels(figure.locator(".plot canvas")) != before).any()
    box = figure.locator(".plot canvas").bounding_box()
    for shift in (0, 5):
        page.mouse.move(box["x"] + box["width"] / 2 + shift, box["y"] + box["height"] / 2)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    words = tip.inner_text()
    assert all(f"layer {layer}" in words for layer in range(32))
    assert "step" in words
    figure.locator("summary", has_text="Numbers").click()
    figure.locator(".numbers tbody tr").nth(350).wait_for()
    assert figure.locator(".numbers tbody tr").count() == 351
    assert figure.locator(".numbers th").count() == 2 + 32
    _shown(page, "scan-layer-map").locator(".plot").focus()
    page.keyboard.press("ArrowRight")
    assert "layer: 0" in page.locator("#scan-layer-map .readout").inner_text()
