"""The documentation site: built strictly, complete, and true to the code."""

from __future__ import annotations

import ast
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer.main
from built_site import ROOT, build_site

import ke_ray
from ke_ray.cli import app
from ke_ray.studies.schema import KINDS


class Page(HTMLParser):
    """What a page links to, loads and can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def pages(site_folder: Path) -> dict[Path, Page]:
    site = site_folder / "build" / "site"
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_inside_the_site_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken, followed = [], 0
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            followed += 1
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert broken == []
    assert followed > 500


def test_no_page_loads_anything_from_the_network(pages: dict[Path, Page]) -> None:
    loads = [load for page in pages.values() for load in page.loads]
    assert [load for load in loads if urlsplit(load).netloc] == []
    assert len(loads) > len(pages)


def test_every_document_and_reference_page_is_in_the_navigation(site_folder: Path) -> None:
    sources = site_folder / "build" / "docs"
    written = {path.relative_to(sources).as_posix() for path in sources.rglob("*.md")}
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(written)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= written


@pytest.mark.parametrize("link", ["no_such_page.md", "science.md#no-such-section"])
def test_a_broken_link_fails_the_build(site_folder: Path, tmp_path: Path, link: str) -> None:
    shutil.copytree(site_folder / "build" / "docs", tmp_path / "build" / "docs")
    with (tmp_path / "build" / "docs" / "s3.md").open("a") as page:
        page.write(f"\n[broken]({link})\n")
    built = build_site(tmp_path)
    assert built.returncode != 0
    assert "does not exist" in re.sub(r"\x1b\[[\d;]*m", "", built.stdout + built.stderr)


def test_the_reference_has_every_command_and_every_key(site_folder: Path) -> None:
    reference = site_folder / "build" / "docs" / "reference"
    commands = (reference / "commands.md").read_text()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        for title in [f"{name} {part}" for part in below] if below else [name]:
            assert f"## ke-ray {title}\n" in commands
    assert "`--set KEY=VALUE`" in commands
    keys = (reference / "studies.md").read_text()
    for kind, model in KINDS.items():
        section = keys.split(f"\n## {kind}\n")[1].split("\n## ")[0]
        assert [key for key in model.model_fields if f"| `{key}` |" not in section] == []
    for key in ("checkpoints.spec", "resuscitation.factor", "optimizer.learning_rate"):
        assert f"| `{key}` |" in keys
    python = (reference / "python.md").read_text()
    assert [name for name in ke_ray.__all__ if f"\n### {name}\n" not in python] == ["__version__"]
    assert "#### SeriesCheckpoint.model\n" in python


def templates() -> set[str]:
    """Every text of ke_ray's code, with … for what it fills in."""
    texts = set()
    for path in (ROOT / "ke_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_the_errors_on_the_page_of_troubles_are_errors_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    texts = {re.sub(r"\s+", " ", text) for text in templates()}
    unknown = []
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        if not any(pattern.match(text) for text in texts):
            unknown.append(message)
    assert unknown == []
    assert len(messages) >= 20


def test_pictures_on_the_site_are_read_by_those_who_cannot_see_them(site_folder: Path) -> None:
    for source in (site_folder / "build" / "docs").rglob("*.md"):
        assert "![](" not in source.read_text()
