"""Figures as the parts of one self-contained HTML page."""

from __future__ import annotations

import html
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ke_ray.report.charts import Chart, Figure, HeatMap, TextTable
from ke_ray.report.svg import draw

__all__ = ["MARK", "Section", "page"]

#: Says that ke_ray made a page, which it may then write anew.
MARK = '<meta name="generator" content="ke_ray">'

# Each figure is drawn at these widths (px); the page shows the one that fits its column.
_WIDTHS = (360, 600)
_WIDE_WIDTHS = (360, 600, 1120)


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
    body = "".join(_section(section) for section in sections)
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
<noscript><p class="warning">The figures are here without JavaScript; other views, tables
and exports need it.</p></noscript>
{body}
</main>
<script>
{(assets / "report.js").read_text(encoding="utf-8")}
</script>
</body>
</html>
"""


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)


def _section(section: Section) -> str:
    notes = "".join(f'<p class="note">{_e(text)}</p>' for text in section.notes)
    facts = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(v)}</dd></div>" for k, v in section.facts)
    figures = "".join(_figure(figure) for figure in section.figures if figure.panels)
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


def _figure(figure: Figure) -> str:
    first, *others = figure.panels
    controls = _controls(figure)
    rest = "".join(
        f'<template data-key="{_key(panel.key)}">{_panel(figure, panel.chart)}</template>'
        for panel in others
    )
    prints = "".join(
        f"<li>{_e(name)}: <code>{_e(value)}</code></li>" for name, value in figure.fingerprints
    )
    origin = (f"<li>files: <code>{_e(figure.source)}</code></li>" if figure.source else "") + (
        f"<li>command: <code>{_e(figure.command)}</code></li>" if figure.command else ""
    )
    paper = f' <span class="paper">cf. paper {_e(figure.paper)}</span>' if figure.paper else ""
    return (
        f'<figure id="{_e(figure.id)}" class="{"wide" if figure.wide else ""}" '
        f'data-key="{_key(first.key)}"><h3>{_e(figure.title)}{paper}</h3>{controls}'
        f'<div class="panel">{_panel(figure, first.chart)}</div>{rest}'
        f"<figcaption>{_e(figure.caption)}</figcaption>"
        '<div class="export" role="group" aria-label="Export">'
        '<button type="button" data-export="png">PNG</button>'
        '<button type="button" data-export="svg">SVG</button>'
        '<button type="button" data-export="csv">CSV</button></div>'
        '<details class="numbers"><summary>Numbers</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers"></div></details>'
        f'<details class="origin"><summary>Where from</summary><ul>{origin}{prints}</ul></details>'
        "</figure>"
    )


def _key(key: Sequence[str]) -> str:
    return _e(json.dumps(list(key), ensure_ascii=False, separators=(",", ":")))


def _controls(figure: Figure) -> str:
    """A menu for each control that has more than one choice."""
    menus = []
    for place, name in enumerate(figure.controls):
        choices = list(dict.fromkeys(panel.key[place] for panel in figure.panels))
        options = "".join(f"<option>{_e(choice)}</option>" for choice in choices)
        hidden = " hidden" if len(choices) < 2 else ""
        menus.append(f"<label{hidden}>{_e(name)} <select data-control>{options}</select></label>")
    return f'<div class="controls">{"".join(menus)}</div>' if menus else ""


def _panel(figure: Figure, chart: Chart | HeatMap | TextTable) -> str:
    if isinstance(chart, TextTable):
        return f'<div class="scroll">{_table(chart)}</div>'
    if chart.empty:
        return '<p class="note">The results hold no finite value for this view.</p>'
    label = f"{figure.title}. {figure.caption}"
    widths = _WIDE_WIDTHS if figure.wide else _WIDTHS
    plots = "".join(
        f'<div class="plot w{width}">{draw(chart, width, label)}</div>' for width in widths
    )
    data = json.dumps(chart.data(), ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in the numbers may end the script element
    return (
        f'<div class="plots" tabindex="0" role="group" aria-label="{_e(figure.title)}: '
        f'arrow keys read out values">{plots}</div>'
        '<p class="readout" role="status"></p>'
        f'<script type="application/json">{data}</script>'
    )
