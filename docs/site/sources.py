"""The sources of the site: the repository's Markdown, pages from the code, and moved links.

    python docs/site/sources.py FOLDER    writes them; `make docs` builds them

The Markdown of the repository stays where it is and reads well there. On the site README.md is the
first page, the other documents at the root and benchmarks/README.md are below ``project/``, and a
file that some page links to (a study, an example) is below ``files/``.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jupytext
import reference  # beside this file

ROOT = Path(__file__).parents[2]
NOTEBOOK = "docs/demo_results.py"
DOCUMENTS = {
    "README.md": "index.md",
    NOTEBOOK: "demo_results.md",
    **{
        name: f"project/{name}"
        for name in (
            *("EXPERIMENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
            "benchmarks/README.md",
        )
    },
    **{f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))},
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def write_sources(folder: Path) -> None:
    """Write Markdown, pictures and linked files into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = reference.pages()
    pages["extra.css"] = (ROOT / "docs" / "site" / "extra.css").read_text(encoding="utf-8")
    for document, page in DOCUMENTS.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        if document == NOTEBOOK:
            notebook = jupytext.reads(text, fmt="py:percent")
            text = notebook_markdown(notebook)
            pages["demo_results.ipynb"] = jupytext.writes(notebook, fmt="ipynb")
        pages[page] = with_links(text, document, page)
        for name in linked(text, document) - DOCUMENTS.keys():
            target = folder / on_site(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    for page, text in pages.items():
        if page == DOCUMENTS[NOTEBOOK]:
            download = "[Download it as a notebook](demo_results.ipynb)."
            text = text.replace("\n", f"\n\n{download}\n", 1)
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")


def with_links(markdown: str, document: str, page: str) -> str:
    """A document's Markdown with its links, relative to the repository, relative to its page."""

    def moved(match: re.Match[str]) -> str:
        return posixpath.relpath(
            on_site(_target(match[1], document)), posixpath.dirname(page) or "."
        )

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def linked(markdown: str, document: str) -> set[str]:
    """The files of the repository that a document links to."""
    prose = _CODE.split(markdown)[::2]
    return {_target(link, document) for part in prose for link in _LINK.findall(part)}


def _target(link: str, document: str) -> str:
    """The path, in the repository, that a link of a document leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), link))


def on_site(target: str) -> str:
    """Where a file of the repository is on the site."""
    if target in DOCUMENTS:
        return DOCUMENTS[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"files/{target}"


def notebook_markdown(notebook: Any) -> str:
    """The cells of a notebook, one below the other."""
    cells = (
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in notebook.cells
    )
    return "\n\n".join(cells) + "\n"


if __name__ == "__main__":
    write_sources(Path(sys.argv[1]))
