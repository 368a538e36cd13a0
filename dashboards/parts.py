"""What the views share: names and menus of results, a chart, a figure of the report."""

from __future__ import annotations

import pandas as pd
import streamlit as st
from plots import to_plotly

from ke_ray.report.charts import Chart, Figure, HeatMap, TextTable
from ke_ray.report.sources import Result

__all__ = ["chart", "figure", "name_of", "pick"]


def name_of(result: Result) -> str:
    """The last two parts of its path."""
    return "/".join(result.path.rstrip("/").split("/")[-2:])


def pick(results: list[Result], kind: str, label: str) -> list[str]:
    """A menu in the side bar; the first three are chosen at the start."""
    names = [name_of(result) for result in results if result.kind == kind]
    return st.sidebar.multiselect(label, names, default=names[:3], key=f"pick-{kind}")


def chart(shown: Chart | HeatMap | TextTable, key: str) -> None:
    """A chart in the page's colours; ``key`` keeps its zoom over refreshes."""
    if isinstance(shown, TextTable):
        st.dataframe(pd.DataFrame(shown.rows, columns=list(shown.columns)), hide_index=True)
    elif shown.empty:
        st.info("The results hold no finite value for this view.")
    else:
        st.plotly_chart(
            to_plotly(shown, dark=st.context.theme.type == "dark"), key=key, width="stretch"
        )


def figure(shown: Figure, key: str) -> None:
    """A figure of the report with its controls as menus."""
    st.subheader(shown.title, anchor=False)
    chosen: list[str] = []
    panels = list(shown.panels)
    menus = st.columns(max(1, len(shown.controls)))
    for place, name in enumerate(shown.controls):
        choices = list(dict.fromkeys(panel.key[place] for panel in panels))
        pick = choices[0]
        if len(choices) > 1:
            pick = menus[place].selectbox(name, choices, key=f"{key}-{shown.id}-{name}")
        chosen.append(pick)
        panels = [panel for panel in panels if panel.key[place] == pick]
    if panels:
        chart(panels[0].chart, f"{key}-{shown.id}")
    st.caption(shown.caption)
