"""What the views share: names, menus and texts of results, a chart, a figure of the report."""

from __future__ import annotations

import re

import pandas as pd
import streamlit as st

from ke_ray.report.charts.comparison import labels
from ke_ray.report.charts.figure import Figure, Plot, TextTable
from ke_ray.report.sources import Result

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")


def plain(text: str) -> str:
    """Text with something of a result in it, for labels and sentences, which are Markdown.

    Others' results could otherwise show links and fetch images.
    """
    return _PUNCTUATION.sub(r"\\\1", text)


def pick(results: list[Result], kind: str, label: str) -> list[str]:
    """The paths of chosen results: a menu in the side bar, with the first three at the start."""
    names = labels([result for result in results if result.kind == kind])
    return st.sidebar.multiselect(
        label, list(names), default=list(names)[:3], format_func=names.get, key=f"pick-{kind}"
    )


def chart(shown: Plot | TextTable, key: str) -> None:
    """A chart of the report in the page's colours; ``key`` keeps it through refreshes."""
    if isinstance(shown, TextTable):
        st.dataframe(pd.DataFrame(shown.rows, columns=list(shown.columns)), hide_index=True)
    elif shown.empty:
        st.info("The results hold no finite value for this view.")
    else:
        theme = "dark" if st.context.theme.type == "dark" else "light"
        st.altair_chart(shown.themed(theme), theme=None, key=key, width="stretch")


def figure(shown: Figure, key: str) -> None:
    """A figure of the report with its controls as menus."""
    st.subheader(plain(shown.title), anchor=False)
    panels = list(shown.panels)
    menus = st.columns(max(1, len(shown.controls)))
    for number, name in enumerate(shown.controls):
        choices = list(dict.fromkeys(panel.key[number] for panel in panels))
        choice = choices[0]
        if len(choices) > 1:
            choice = menus[number].selectbox(name, choices, key=f"{key}-{shown.id}-{name}")
        panels = [panel for panel in panels if panel.key[number] == choice]
    if panels:
        chart(panels[0].view, f"{key}-{shown.id}")
    st.caption(plain(shown.caption))
