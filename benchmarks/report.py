"""What a report costs: to build, to open, to switch a measure, to move the pointer.

    python benchmarks/report.py RESULTS… [--rounds 5] [--json]

Needs the package ``playwright`` and a Chromium, as ``ke_ray.report.screenshots`` does. Opening is
wall-clock time from the request to the frame with all figures in view drawn; the others are CPU
time, of the page's main thread and, for building, of the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ke_ray.report.screenshots import launch_chromium

# Sets `drawn` in the frame in which all figures in view are drawn.
_WATCH = """addEventListener("load", () => {
    const inView = ({ top, bottom }) => top < innerHeight && bottom > 0;
    const look = () => {
        const plots = [...document.querySelectorAll("figure .plot")]
            .filter((plot) => inView(plot.getBoundingClientRect()));
        const done = (plot) => plot.closest("figure").dataset.drawn || plot.querySelector("table");
        if (plots.every(done)) window.drawn = performance.now();
        else requestAnimationFrame(look);
    };
    look();
});"""
_SWITCH = """async ([id, choice]) => {
    const figure = document.getElementById(id), menu = figure.querySelector("select");
    menu.value = choice;
    menu.dispatchEvent(new Event("change"));
    while (!(figure.dataset.drawn ?? "").includes(choice)) await new Promise((r) => setTimeout(r));
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
}"""
_MOVE = """async ([x, y]) => {
    const element = document.elementFromPoint(x, y);
    for (const kind of ["pointermove", "mousemove"])
        element.dispatchEvent(new PointerEvent(kind, { clientX: x, clientY: y, bubbles: true }));
    await new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
}"""
_FIGURES = ("scan-layers", "scan-layer-map")


def _build(results: str, target: Path) -> float:
    """CPU seconds of ``ke-ray report``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["-m", "ke_ray", "report", results, "--output", str(target)]
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _open(browser: Any, address: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(_WATCH)
    page.goto(address)
    page.wait_for_function("window.drawn")
    return page


def _main_thread_ms(session: Any) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return 1000 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


def _median_ms(session: Any, steps: list[Any]) -> float:
    """The median CPU time of the page's main thread over some steps."""
    times = []
    for step in steps:
        start = _main_thread_ms(session)
        step()
        times.append(_main_thread_ms(session) - start)
    return statistics.median(times)


def _figure(page: Any, session: Any, name: str, rounds: int) -> dict[str, float]:
    """Switching the first menu of a figure, and moving the pointer over it."""
    figure = page.locator(f"#{name}")
    figure.scroll_into_view_if_needed()
    page.locator(f"#{name}[data-drawn]").wait_for()
    page.wait_for_timeout(1000)  # figures near by are drawn as well
    choices = figure.locator("select").first.locator("option").all_inner_texts()
    chosen = [choices[(number + 1) % len(choices)] for number in range(rounds)]
    switches = [lambda choice=choice: page.evaluate(_SWITCH, [name, choice]) for choice in chosen]
    times = {"switch_cpu_ms": _median_ms(session, switches)}
    box = figure.locator(".plot").bounding_box()
    points = [[box["x"] + 200 + 7 * n, box["y"] + box["height"] / 2] for n in range(3 * rounds)]
    moves = [lambda point=point: page.evaluate(_MOVE, point) for point in points]
    return times | {"pointer_cpu_ms": _median_ms(session, moves)}


def measure(results: str, browser: Any, rounds: int) -> dict[str, Any]:
    """The costs of one report."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "report.html"
        costs: dict[str, Any] = {
            "results": results,
            "build_cpu_s": statistics.median(_build(results, target) for _ in range(rounds)),
            "size_mb": target.stat().st_size / 1e6,
        }
        times = []
        for _ in range(rounds):
            page = _open(browser, target.as_uri())
            times.append(page.evaluate("window.drawn"))
            page.close()
        costs["open_ms"] = [min(times), statistics.median(times), max(times)]
        page = _open(browser, target.as_uri())
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        for name in _FIGURES:
            if page.locator(f"#{name}").count():
                costs[name] = _figure(page, session, name, rounds)
        page.close()
    return costs


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    with launch_chromium() as browser:
        reports = [measure(results, browser, options.rounds) for results in options.results]
    for costs in reports:
        low, median, high = costs["open_ms"]
        print(
            f"{costs['results']}: {costs['size_mb']:.1f} MB, built in {costs['build_cpu_s']:.1f} s "
            f"of CPU, opened in {median:.0f} ms ({low:.0f} to {high:.0f})"
        )
        for name in _FIGURES:
            if times := costs.get(name):
                print(
                    f"  {name}: a switch takes {times['switch_cpu_ms']:.0f} ms of CPU, a move of "
                    f"the pointer {times['pointer_cpu_ms']:.0f} ms"
                )
    if options.json:
        print(json.dumps({"reports": reports}))


if __name__ == "__main__":
    main()
