"""What the code and the docs point to exists in the repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ke_ray import __version__
from ke_ray.report.paper import STEPS, TABLE_1

ROOT = Path(__file__).parents[1]
FOLDERS = ("ke_ray", "sweeps", "jobs", "dashboards", "benchmarks", "docs", "tests")
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def text_files() -> Iterator[Path]:
    """All files of the repository that people read, this one left out."""
    suffixes = {".py", ".md", ".yaml", ".toml"}
    for folder in FOLDERS:
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    yield from (path for path in ROOT.iterdir() if path.suffix in suffixes)


def anchors(markdown: Path) -> set[str]:
    """Anchors of a file's headings, as GitHub forms them."""
    text = re.sub(r"^```.*?^```", "", markdown.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sections_named_in_the_repository_exist():
    references = [
        (str(path.relative_to(ROOT)), document, anchor)
        for path in text_files()
        for document, anchor in re.findall(r"\b(docs/\w+\.md)#([\w-]+)", path.read_text())
    ]
    missing = [ref for ref in references if ref[2] not in anchors(ROOT / ref[1])]
    assert missing == []
    assert len(references) > 5, "docstrings name sections of docs/science.md"


@pytest.mark.parametrize("markdown", MARKDOWN, ids=lambda path: path.name)
def test_links_between_documents_resolve(markdown):
    missing = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", markdown.read_text()):
        name, _, anchor = link.partition("#")
        target = markdown.parent / name if name else markdown
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_nothing_refers_to_a_document_outside_the_repository():
    pattern = re.compile(r"(?<!KE_RAY_)REFERENCE\b(?!_DATA)")
    outside = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in text_files()
        if path != Path(__file__)
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert outside == []


def test_the_published_table_in_the_docs_is_the_one_that_reports_draw():
    text = (ROOT / "docs" / "science.md").read_text().replace("−", "-")
    rows = re.findall(r"^\| [^|]+ \|((?: [-\d.]+ / [-\d.]+ \|){4})$", text, flags=re.MULTILINE)
    printed = [[tuple(map(float, cell.split("/"))) for cell in row.split("|")[:-1]] for row in rows]
    drawn = [list(zip(row.acquisition, row.forgetting, strict=True)) for row in TABLE_1.values()]
    assert printed == drawn
    assert all(f"{step // 1000}k |" in text for step in STEPS)


def test_the_map_of_contributing_names_places_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Map") : text.index("## House rules")]
    paths = re.findall(r"`(ke_ray/[\w/.]+)`", table)
    assert len(paths) >= 6
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_facts_taken_from_elsewhere_say_whence_and_under_which_licence() -> None:
    """Lists of addresses, check sums, published numbers, and the fields of others' interfaces."""
    known = {
        "ke_ray/report/paper.py",
        "ke_ray/models/published.py",
        "ke_ray/planning/speed.py",
        "docs/series.md",
        "tests/helpers/kuberay_fields.py",
    }
    shipped = [
        p for f in ("ke_ray", "sweeps", "jobs", "dashboards") for p in (ROOT / f).rglob("*.*")
    ]
    lists = {
        path.relative_to(ROOT).as_posix()
        for path in shipped
        if path.suffix in (".yaml", ".yml", ".json", ".csv", ".py")
        for text in [path.read_text()]
        if len(re.findall(r"https://[\w.-]+\.\w+/\S", text)) > 3
        or re.search(r"\b[0-9a-f]{64}\b", text)
    }
    assert {"sweeps/olmo_1b_data.yml", "ke_ray/data/published.yaml"} <= lists
    for name in known | lists:
        text = re.sub(r"\s+#?\s*", " ", (ROOT / name).read_text()[:3000])
        assert re.search(r"\bFacts: [^.]+.*?\(licence: [^)]+\)", text), name


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
