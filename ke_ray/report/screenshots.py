"""Screenshots of the report and of the interactive page, for the README and for looking at them.

    python -m ke_ray.report.screenshots RESULTS… --output FOLDER [--all]

Needs the package ``playwright`` and a Chromium (Debian's ``chromium``, or ``KE_RAY_CHROMIUM``).
Writes ``report.png`` and ``dashboard.png``, and two figures of the demo where the results have
them; ``--all`` also takes every page whole, at 1,280 and 420 px, in light and dark.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ke_ray.errors import KeRayError, UserError

_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
_QUIET = ("--disable-background-networking", "--disable-component-update")
_FIGURES = {
    "continual-acquisition": "demo_acquisition.png",
    "sweep-factor-curve": "demo_factor.png",
}
_VIEWS = ("Checkpoints", "Continual learning", "Sweeps", "MLflow")
_WAIT_MS = 60_000


@contextlib.contextmanager
def launch_chromium() -> Iterator[Any]:
    """A headless browser of playwright's.

    Raises:
        UserError: no Chromium, or no playwright.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("A browser needs 'pip install playwright'.") from error
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("KE_RAY_CHROMIUM") or next(
        filter(None, map(shutil.which, names)), None
    )
    if program is None:
        raise UserError("There is no Chromium: install one, or set KE_RAY_CHROMIUM to it.")
    with sync_playwright() as driver:
        flags = [*_FLAGS, *_QUIET]
        browser = driver.chromium.launch(executable_path=program, args=flags, headless=True)
        yield browser
        browser.close()


def take(results: Sequence[str], output: Path, *, everything: bool = False) -> list[Path]:
    """Build the report, start the page, and photograph both.

    Returns:
        The files that were written.

    Raises:
        UserError: no Chromium, no playwright, or a path that does not exist.
        KeRayError: the page does not come up.
    """
    from ke_ray.report.build import build_report
    from ke_ray.report.dashboard import start_dashboard

    output.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    with launch_chromium() as browser, tempfile.TemporaryDirectory() as folder:
        report = Path(build_report(list(results), Path(folder) / "report.html")).as_uri()
        made.append(_top_of_report(browser, report, output / "report.png"))
        made += _figures(browser, report, output)
        with start_dashboard(list(results), log=Path(folder) / "pages.log") as running:
            made.append(_page(browser, running.url, output / "dashboard.png"))
            for width in (1280, 420) if everything else ():
                for scheme in ("light", "dark"):
                    made += _whole(browser, report, running.url, output, width, scheme)
    return made


def _open(browser: Any, address: str, width: int, height: int, scheme: str) -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()
    page.goto(address)
    return page


def _top_of_report(browser: Any, address: str, target: Path) -> Path:
    """The first scan's figures where there is one, else the top of the page."""
    page = _open(browser, address, 1280, 1120, "light")
    _draw_all(page)
    page.evaluate(
        "() => { const s = document.querySelector('section[id^=scan]');"
        " if (s) window.scrollTo(0, s.getBoundingClientRect().top + window.scrollY); }"
    )
    page.screenshot(path=target)
    page.context.close()
    return target


def _figures(browser: Any, address: str, output: Path) -> list[Path]:
    """Single figures, for docs/demo.md."""
    page = _open(browser, address, 1280, 1120, "light")
    _draw_all(page)
    made = []
    for figure, name in _FIGURES.items():
        if page.locator(f"#{figure}").count():
            page.locator(f"#{figure}").screenshot(path=output / name)
            made.append(output / name)
    page.context.close()
    return made


def _draw_all(page: Any) -> None:
    """Have the report draw what is out of view as well, as it does before printing."""
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "[...document.querySelectorAll('figure')].every((figure) =>"
        " figure.dataset.drawn || figure.querySelector('.plot table'))",
        timeout=_WAIT_MS,
    )


def _settle(page: Any) -> None:
    """Wait until Streamlit has drawn: no script runs and the figures have their lines."""
    page.wait_for_timeout(500)  # a click has to start the script first
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(
        timeout=_WAIT_MS
    )
    page.wait_for_timeout(1500)


def _page(browser: Any, address: str, target: Path) -> Path:
    page = _open(browser, address, 1280, 1000, "light")
    page.get_by_text("Read ").first.wait_for(timeout=_WAIT_MS)
    _settle(page)
    page.screenshot(path=target)
    page.context.close()
    return target


def whole_report(browser: Any, address: str, target: Path, width: int, scheme: str) -> Path:
    """The report from top to bottom; ``scheme`` is "light" or "dark"."""
    page = _open(browser, address, width, 900, scheme)
    _draw_all(page)
    page.screenshot(path=target, full_page=True)
    page.context.close()
    return target


def _whole(
    browser: Any, report: str, dashboard: str, output: Path, width: int, scheme: str
) -> list[Path]:
    target = output / f"report-{width}-{scheme}.png"
    made = [whole_report(browser, report, target, width, scheme)]
    page = _open(browser, dashboard, width, 2600, scheme)
    page.get_by_text("Read ").first.wait_for(timeout=_WAIT_MS)
    for name in _VIEWS:
        page.get_by_text(name, exact=True).first.click()
        _settle(page)
        made.append(output / f"dashboard-{name.split()[0].lower()}-{width}-{scheme}.png")
        page.screenshot(path=made[-1])
    page.context.close()
    return made


def main() -> int:
    """The command; 0 when the files were written, 2 where something needed is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m ke_ray.report.screenshots"
    )
    parser.add_argument("results", nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--all", action="store_true", help="every page at every size")
    options = parser.parse_args()
    try:
        for path in take(options.results, options.output, everything=options.all):
            print(path)
    except KeRayError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
