"""Tables of ``docs/results.md``, generated from the declared columns and measures.

``python -m ke_ray.results.column_docs`` rewrites them; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

from ke_ray.core.measures import MEASURES
from ke_ray.results.columns import TABLES


def markdown(table: str) -> str:
    """The columns of a table as a Markdown table."""
    lines = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    for column in TABLES[table]:
        meaning = "; ".join(
            part
            for part in (
                column.doc.replace("|", "\\|"),
                "higher is better" if column.direction == "maximize" else "",
                "lower is better" if column.direction == "minimize" else "",
            )
            if part
        )
        cells = (f"`{column.name}`", column.type.strip("_"), column.unit or "–", meaning or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measures_markdown() -> str:
    """The measures as a Markdown table."""
    lines = ["| measure | unit | total | value of a layer |", "|---|---|---|---|"]
    for measure in MEASURES.values():
        meaning = "; ".join(
            part
            for part in (
                measure.doc.replace("|", "\\|"),
                "" if measure.has_error else "no error",
                "lower is better" if measure.direction == "minimize" else "",
                "higher is better" if measure.direction == "maximize" else "",
                "" if measure.is_default else "not measured by default",
            )
            if part
        )
        total = "the only value" if measure.total == "only" else measure.total
        lines.append(f"| `{measure.name}` | {measure.unit} | {total} | {meaning} |")
    return "\n".join(lines)


_COLUMNS = re.compile(r"(<!-- columns: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MEASURES = re.compile(r"(<!-- measures -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_in(text: str) -> str:
    """Markdown with every table of columns, and that of measures, replaced."""
    text = _COLUMNS.sub(lambda match: f"{match[1]}\n{markdown(match[2])}\n\n{match[3]}", text)
    return _MEASURES.sub(lambda match: f"{match[1]}\n{measures_markdown()}\n\n{match[2]}", text)


if __name__ == "__main__":
    page = Path("docs/results.md")
    page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")
