"""Tables of ``docs/results.md``, generated from the declared columns.

``python -m ke_ray.results.column_docs`` rewrites them; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

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


_BLOCK = re.compile(r"(<!-- columns: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_in(text: str) -> str:
    """Markdown with the table after each ``<!-- columns: NAME -->`` replaced."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{markdown(match[2])}\n\n{match[3]}", text)


if __name__ == "__main__":
    page = Path("docs/results.md")
    page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")
