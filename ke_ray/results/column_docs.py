"""Tables of ``docs/results.md`` and ``docs/measures.md``, generated from what is declared.

``python -m ke_ray.results.column_docs`` rewrites them; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

from ke_ray.core.measure import BUILT_IN
from ke_ray.core.sums import TABLES as TABLES_OF_SUMS
from ke_ray.core.sums import Sum
from ke_ray.results.columns import TABLES

DOCS = Path(__file__).parents[2] / "docs"


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
    for measure in BUILT_IN:
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


def declarations_markdown() -> str:
    """How every measure is computed, as a Markdown table."""
    lines = ["| measure | title | sums | default | error |", "|---|---|---|---|---|"]
    for measure in BUILT_IN:
        default = "mixtures" if measure.by_expert else "yes" if measure.is_default else "–"
        sums = ", ".join(f"`{table}`" for table in measure.tables)
        error = "yes" if measure.has_error else "–"
        lines.append(f"| `{measure.name}` | {measure.title} | {sums} | {default} | {error} |")
    return "\n".join(lines)


def sums_markdown() -> str:
    """The sums and their shapes, as a Markdown table."""
    lines = ["| sum | tap | shape of its mean |", "|---|---|---|"]
    own = {need.name: need for m in BUILT_IN for need in m.needs_all if isinstance(need, Sum)}
    for name, axes in {**TABLES_OF_SUMS, **{n: s.table_axes for n, s in own.items()}}.items():
        tap = f"`{own[name].tap}`" if name in own else "–"
        lines.append(f"| `{name}` | {tap} | {' × '.join(axes) or 'one number'} |")
    return "\n".join(lines)


_COLUMNS = re.compile(r"(<!-- columns: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FILE = re.compile(r"(<!-- file: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLES = {
    "measures": measures_markdown,
    "declarations": declarations_markdown,
    "sums": sums_markdown,
}


def _file(match: re.Match[str]) -> str:
    code = (DOCS / match[2]).read_text(encoding="utf-8")
    return f"{match[1]}\n```python\n{code}```\n\n{match[3]}"


def fill_in(text: str) -> str:
    """Markdown with every generated table, and every file that it shows, replaced."""
    text = _COLUMNS.sub(lambda match: f"{match[1]}\n{markdown(match[2])}\n\n{match[3]}", text)
    text = _FILE.sub(_file, text)
    for pattern, table in _TABLES.items():
        text = re.sub(
            rf"(<!-- {pattern} -->\n).*?(<!-- end -->)",
            lambda match, table=table: f"{match[1]}\n{table()}\n\n{match[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for name in ("results.md", "measures.md"):
        page = DOCS / name
        page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")
