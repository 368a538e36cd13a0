"""Figures as the parts of one self-contained HTML page, which draws them with Vega."""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ke_ray.report.charts.figure import Figure, Panel, TextTable
from ke_ray.report.charts.theme import config

#: Says that ke_ray made a page, which it may then replace.
MARK = '<meta name="generator" content="ke_ray">'


@dataclass(frozen=True)
class Section:
    """One result, or one theme, of the report."""

    id: str
    title: str
    intro: str = ""
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, TextTable]] = ()
    missing: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = field(default=())


def page(title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document; opens from a file without any network."""
    assets = importlib.resources.files("ke_ray.report") / "assets"
    links = "".join(f'<a href="#{_e(section.id)}">{_e(section.title)}</a>' for section in sections)
    boxes = "".join(f'<p class="warning" role="alert">{_e(text)}</p>' for text in warnings)
    rows = _Rows()
    body = "".join(_section(section, rows) for section in sections)
    drawn = any(figure.panels for section in sections for figure in section.figures)
    scripts = [_json({theme: config(theme) for theme in ("light", "dark")}, id="themes")]
    scripts += [_json(content, id=name) for name, content in rows.encoded.items()]
    scripts += [f"<script>{_vega()}</script>"] if drawn else []
    return f"""<!doctype html>
<html lang="en" data-theme="auto">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_e(title)}</title>
<style>
{(assets / "report.css").read_text(encoding="utf-8")}
</style>
</head>
<body>
<a class="skip" href="#content">Skip to the figures</a>
<header>
<h1>{_e(title)}</h1>
<p class="lead">{_e(lead)}</p>
<div class="bar"><nav aria-label="Sections">{links}</nav>
<button type="button" id="theme" aria-live="polite">Colours: as the system</button></div>
</header>
<main id="content">
{boxes}
<noscript><p class="warning">The figures and their numbers need JavaScript; it is in this file, and
nothing is fetched.</p></noscript>
{body}
</main>
{"".join(scripts)}
<script>
{(assets / "report.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which sets ``vegaEmbed``."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


class _Rows:
    """The rows of all plots, each table of rows once, as columns."""

    def __init__(self) -> None:
        self.encoded: dict[str, dict[str, Any]] = {}
        self._names: dict[int, tuple[str, pd.DataFrame]] = {}  # keeps the frame, and so its id

    def name(self, rows: pd.DataFrame) -> str:
        """The id of the script element with these rows."""
        if id(rows) not in self._names:
            columns = {str(name): _column(rows[name]) for name in rows}
            digest = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
            self._names[id(rows)] = (f"rows-{digest[:16]}", rows)
            self.encoded.setdefault(f"rows-{digest[:16]}", columns)
        return self._names[id(rows)][0]


def _column(values: pd.Series) -> Any:
    """Numbers at seven significant digits, null where unknown; texts by number in a list."""
    if pd.api.types.is_bool_dtype(values):
        return values.tolist()
    if pd.api.types.is_numeric_dtype(values):
        return [_number(value) for value in values.tolist()]
    codes, names = pd.factorize(values.astype(object))
    return {"names": [str(name) for name in names], "at": codes.tolist()}


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.7g}")


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _json(content: Any, **attributes: str) -> str:
    """A script element that holds JSON; no text in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    attributes_text = "".join(f' {name}="{_e(value)}"' for name, value in attributes.items())
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json"{attributes_text}>{text}</script>'


def _section(section: Section, rows: _Rows) -> str:
    notes = "".join(f'<p class="note">{_e(text)}</p>' for text in section.notes)
    facts = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in section.facts)
    figures = "".join(_figure(figure, rows) for figure in section.figures if figure.panels)
    tables = "".join(
        f'<h3>{_e(name)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{_e(name)}">{_table(table)}</div>'
        for name, table in section.tables
        if not table.empty
    )
    missing = "".join(f"<li>{_e(text)}</li>" for text in section.missing)
    return (
        f'<section id="{_e(section.id)}" aria-labelledby="{_e(section.id)}-title">'
        f'<h2 id="{_e(section.id)}-title">{_e(section.title)}</h2>'
        + (f"<p>{_e(section.intro)}</p>" if section.intro else "")
        + notes
        + (f'<dl class="facts">{facts}</dl>' if facts else "")
        + (f'<div class="figures">{figures}</div>' if figures else "")
        + tables
        + (f'<h3>Not shown</h3><ul class="missing">{missing}</ul>' if missing else "")
        + "</section>"
    )


def _table(table: TextTable) -> str:
    head = "".join(f'<th scope="col">{_e(name)}</th>' for name in table.columns)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: object) -> str:
    long = ' class="long"' if len(str(value)) > 40 else ""
    return f"<td{long}>{_e(value)}</td>"


def _figure(figure: Figure, rows: _Rows) -> str:
    prints = "".join(
        f"<li>{_e(name)}: <code>{_e(value)}</code></li>" for name, value in figure.fingerprints
    )
    origin = (f"<li>files: <code>{_e(figure.source)}</code></li>" if figure.source else "") + (
        f"<li>command: <code>{_e(figure.command)}</code></li>" if figure.command else ""
    )
    paper = f' <span class="paper">cf. paper {_e(figure.paper)}</span>' if figure.paper else ""
    specs: list[Any] = []
    panels = [_panel(panel, rows, specs) for panel in figure.panels]
    return (
        f'<figure id="{_e(figure.id)}" class="{"wide" if figure.wide else ""}">'
        f"<h3>{_e(figure.title)}{paper}</h3>{_controls(figure)}"
        f'<div class="plot" tabindex="0" role="group" aria-label="{_e(figure.title)}: '
        'arrow keys read out values"></div><p class="readout" role="status"></p>'
        f"<figcaption>{_e(figure.caption)}</figcaption>"
        '<div class="export" role="group" aria-label="Export">'
        '<button type="button" data-export="png">PNG</button>'
        '<button type="button" data-export="svg">SVG</button>'
        '<button type="button" data-export="csv">CSV</button></div>'
        '<details class="numbers"><summary>Numbers</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers"></div></details>'
        f'<details class="origin"><summary>Where from</summary><ul>{origin}{prints}</ul></details>'
        f"{_json({'panels': panels, 'specs': specs})}</figure>"
    )


def _panel(panel: Panel, rows: _Rows, specs: list[Any]) -> dict[str, Any]:
    """What the page needs of a view; equal specifications of a figure are kept once."""
    view, content = panel.view, {"key": list(panel.key)}
    if isinstance(view, TextTable):
        table = [list(view.columns), *([str(cell) for cell in row] for row in view.rows)]
        return content | {"table": table}
    if view.empty:
        return content | {"table": [["The results hold no finite value for this view."]]}
    spec = view.spec()
    if spec not in specs:
        specs.append(spec)
    return content | {
        "spec": specs.index(spec),
        "rows": rows.name(view.rows),
        "columns": view.columns,
        "spread": view.spread,
        "value": view.value,
    }


def _controls(figure: Figure) -> str:
    """A menu for each control that has more than one choice."""
    menus = []
    for number, name in enumerate(figure.controls):
        choices = list(dict.fromkeys(panel.key[number] for panel in figure.panels))
        options = "".join(f"<option>{_e(choice)}</option>" for choice in choices)
        hidden = " hidden" if len(choices) < 2 else ""
        menus.append(f"<label{hidden}>{_e(name)} <select data-control>{options}</select></label>")
    return f'<div class="controls">{"".join(menus)}</div>' if menus else ""
