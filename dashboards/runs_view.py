"""The views of continual-learning runs, sweep trials and MLflow."""

from __future__ import annotations

import pandas as pd
import streamlit as st
from mlflow_api import experiments, run_link, runs
from parts import figure, plain

from ke_ray.report import runs as run_tables
from ke_ray.report.charts.comparison import labels
from ke_ray.report.charts.continual import continual_figures
from ke_ray.report.charts.sweep import sweep_figures
from ke_ray.report.sources import Result


def show_runs(results: list[Result], kind: str, chosen: list[str], mlflow: str | None) -> None:
    """The report's figures of the chosen studies, with their runs and links to MLflow."""
    studies = [result for result in results if result.path in chosen]
    if not studies:
        command = (
            "ke-ray continual STUDY.yaml" if kind == "continual" else "ke-ray sweep STUDY.yaml"
        )
        st.info(f"Nothing chosen, or nothing there yet. Make some with `{command}`.")
    for study in studies:
        if len(studies) > 1:
            st.header(plain(labels(studies)[study.path]), anchor=False)
        make = continual_figures if kind == "continual" else sweep_figures
        figures, missing = make(study, kind)
        for each in figures:
            figure(each, study.path)
        _run_table(study, mlflow)
        for text in (*study.notes, *missing):
            st.caption(plain(text))


def _run_table(study: Result, mlflow: str | None) -> None:
    frame, broken = run_tables.good_runs(study), run_tables.failed_runs(study)
    columns = [run_tables.run_key(study), "checkpoint", "seed", "variant", *run_tables.RUN_COLUMNS]
    shown = frame[[name for name in columns if name in frame and frame[name].notna().any()]].copy()
    if mlflow and "mlflow_run_id" in frame:
        shown["MLflow"] = [_link(mlflow, run_id) for run_id in frame["mlflow_run_id"]]
    st.subheader("Runs" if study.kind == "continual" else "Trials", anchor=False)
    st.dataframe(
        shown,
        hide_index=True,
        column_config={"MLflow": st.column_config.LinkColumn(display_text="open run")},
    )
    if len(broken):
        st.subheader("Not finished", anchor=False)
        st.dataframe(broken, hide_index=True)


@st.cache_data(ttl=300, show_spinner=False)
def _link(mlflow: str, run_id: str | None) -> str | None:
    if not isinstance(run_id, str) or not run_id:
        return None
    try:
        return run_link(mlflow, run_id)
    except (OSError, KeyError):
        return None


def show_mlflow(mlflow: str | None) -> None:
    """Runs of an MLflow experiment, with links."""
    if mlflow is None:
        st.info("No MLflow server was given: start the page with `ke-ray dashboard`.")
        return
    st.link_button("Open MLflow", mlflow)
    try:
        ids = experiments(mlflow)
        name = st.selectbox("Experiment", list(ids))
        rows = pd.DataFrame(runs(mlflow, ids[name])) if name else pd.DataFrame()
    except (OSError, ValueError) as error:
        st.warning(plain(f"MLflow at {mlflow} does not answer: {error}"))
        return
    if rows.empty:
        st.info("This experiment has no runs yet.")
    else:
        link = st.column_config.LinkColumn("MLflow", display_text="open run")
        st.dataframe(rows, hide_index=True, column_config={"link": link})
