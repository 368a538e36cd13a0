"""The documentation site in a real browser: read, searched, narrow and wide."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

PAGES = (
    *("index", "demo", "demo_results", "science", "results", "troubleshooting", "measures"),
    *("reference/commands", "reference/studies", "reference/python", "project/EXPERIMENTS"),
)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site_folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site_folder / "build" / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 420])
def test_pages_are_whole_and_load_from_nowhere_else(
    address: str, open_page: Callable, width: int
) -> None:
    page = open_page(f"{address}/index.html", width=width)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    # A page that is left while its search index loads aborts that; nothing has failed.
    page.on(
        "requestfailed",
        lambda request: (
            failed.append(request.url) if request.failure != "net::ERR_ABORTED" else None
        ),
    )
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    for name in PAGES:
        page.goto(f"{address}/{name}.html", wait_until="load")
        assert page.locator("article h1").count() == 1, name
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(overflow) <= 0, name
        broken = "[...document.images].filter((i) => i.complete && !i.naturalWidth).length"
        assert page.evaluate(broken) == 0, name
    assert failed == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("width", "words", "target"),
    [
        (1280, "acquisition_vs_original", "sweeps.html#reading-a-and-f"),
        (420, "step_pattern", "reference/studies.html#scan"),
    ],
)
def test_the_search_finds_what_it_leads_to(
    address: str, open_page: Callable, width: int, words: str, target: str
) -> None:
    page = open_page(f"{address}/index.html", width=width)
    page.locator("label[for=__search], .md-search__button").locator("visible=true").click()
    page.get_by_role("combobox", name="Search").fill(words)
    name, _, anchor = target.partition("#")
    result = page.locator(f"a[href*='/{name}?'][href$='#{anchor}']")
    result.wait_for()
    result.click()
    page.wait_for_url(f"**/{name}*")
    assert words in page.locator("article").inner_text()
