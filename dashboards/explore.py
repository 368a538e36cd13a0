"""The interactive page: ``streamlit run dashboards/explore.py -- RESULTS… [--mlflow URL]``.

Usually started by ``ke-ray dashboard``. It reads result folders and, over REST, an MLflow server.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import streamlit as st
from parts import pick, plain
from runs_view import show_mlflow, show_runs
from scans_view import scan_menus, show_scans

from ke_ray.errors import KeRayError
from ke_ray.report.sources import Result, find_results

_VIEWS = ("Checkpoints", "Continual learning", "Sweeps", "MLflow")
_INTERVALS = {"off": None, "every 2 s": 2, "every 10 s": 10, "every 60 s": 60}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="*", default=["runs"])
    parser.add_argument("--mlflow", default=None, help="address of an MLflow server")
    return parser.parse_args(sys.argv[1:])


def _state(paths: Sequence[str]) -> tuple[object, ...]:
    """Changes whenever a result file does; remote folders count as changed every 30 seconds."""
    seen: list[object] = []
    for path in paths:
        if "://" in path:
            seen.append(int(datetime.datetime.now().timestamp() // 30))
            continue
        for folder, _, files in os.walk(path):
            for name in files:
                if name.endswith((".parquet", "manifest.json")):
                    try:
                        info = (Path(folder) / name).stat()
                    except FileNotFoundError:
                        continue  # renamed or folded while we looked
                    seen.append((folder, name, info.st_mtime_ns, info.st_size))
    return tuple(sorted(seen, key=str))


@st.cache_resource(max_entries=4, show_spinner="Reading results …")
def _load(paths: tuple[str, ...], state: tuple[object, ...]) -> list[Result]:
    return find_results(paths)


def _results(paths: Sequence[str]) -> list[Result]:
    try:
        return _load(tuple(paths), _state(paths))
    except KeRayError as error:
        st.warning(plain(str(error)))
        return []


def main() -> None:
    """Draw the page."""
    st.set_page_config(page_title="Knowledge entropy", layout="wide")
    options = _arguments()
    st.title("Knowledge entropy", anchor=False)
    view = st.segmented_control(
        "View", _VIEWS, default=_VIEWS[0], required=True, label_visibility="collapsed"
    )
    results = _results(options.results)
    interval = _INTERVALS[
        st.sidebar.selectbox("Follow running work", list(_INTERVALS), key="every")
    ]
    shown = plain(", ".join(options.results))
    menus, chosen, kind = None, [], ""
    if view == _VIEWS[0]:
        menus = scan_menus(results)
    elif view in _VIEWS[1:3]:
        kind = "continual" if view == _VIEWS[1] else "sweep"
        chosen = pick(results, kind, "Studies")

    @st.fragment(run_every=interval)
    def body() -> None:
        fresh = _results(options.results)
        if view == _VIEWS[3]:
            show_mlflow(options.mlflow)
        elif not fresh:
            st.info(
                f"No results in {plain(', '.join(options.results))}. `ke-ray demo` makes a set."
            )
        elif view in _VIEWS[1:3]:
            show_runs(fresh, kind, chosen, options.mlflow)
        elif menus is not None:
            show_scans(fresh, menus)
        now = datetime.datetime.now().astimezone()
        st.caption(f"Read {now:%H:%M:%S} from {shown}")

    body()


main()
