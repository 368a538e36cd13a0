"""``ke-ray report``: one self-contained HTML file from result folders."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Sequence
from typing import Any

import pandas as pd
from altair.utils.schemapi import debug_mode

from ke_ray import storage
from ke_ray.core.measures import MEASURES
from ke_ray.report import runs, series
from ke_ray.report.charts import comparison
from ke_ray.report.charts.continual import continual_figures
from ke_ray.report.charts.figure import Panel, TextTable, figure_of, number
from ke_ray.report.charts.plot import X, series_plot
from ke_ray.report.charts.relation import relation_figures
from ke_ray.report.charts.scan import duplicates, failures, scan_figures
from ke_ray.report.charts.sweep import sweep_figures
from ke_ray.report.page import MARK, Section, page
from ke_ray.report.sources import Result, find_results
from ke_ray.storage.ownership import check_replaceable

_KIND_TITLES = {
    "pretrain": "Pretraining",
    "scan": "Scan",
    "continual": "Continual learning",
    "sweep": "Sweep",
}
_HOW = {
    "scan": "No scan: 'ke-ray scan CHECKPOINTS --data DATA --output DIR' makes one.",
    "continual": "No continual learning: 'ke-ray continual STUDY.yaml' makes some.",
    "sweep": "No sweep: 'ke-ray sweep sweeps/demo.yaml' makes one.",
}


def build_report(
    results: Sequence[str | os.PathLike[str]], output_html: str | os.PathLike[str]
) -> str:
    """Write a report of every result at or below the given paths.

    The page needs no network and no other file. It shows what the files hold and names what they
    lack; with no result at all it says how to make some.

    Args:
        results: result folders, or folders that hold some; any fsspec URI.
        output_html: where the page goes; any fsspec URI.

    Returns:
        ``output_html``.

    Raises:
        UserError: a path does not exist.
        StorageError: a file that ke_ray did not make stands at ``output_html``.
    """
    target = os.fspath(output_html)
    check_replaceable(target, MARK.encode(), "report.html")
    folders = find_results(results)
    kinds = [kind for kind in _KIND_TITLES if any(result.kind == kind for result in folders)]
    names = ", ".join(dict.fromkeys(os.fspath(path).rstrip("/") for path in results))
    lead = (
        f"{len(folders)} result{'s' if len(folders) != 1 else ''} in {names}; written "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC."
    )
    title = "Knowledge entropy: " + (
        ", ".join(_KIND_TITLES[kind].lower() for kind in kinds) if kinds else "no results yet"
    )
    with debug_mode(False):  # tests check every chart against the schema; here it takes seconds
        html = page(title, lead, comparison.warnings(folders), sections(folders))
    storage.write_atomic(target, html)
    return target


def sections(results: Sequence[Result]) -> list[Section]:
    """The parts of the report: a comparison if possible, a section per result, what is missing."""
    parts: list[Section] = []
    together = [
        *relation_figures(results),
        *comparison.compare_scans(results),
        *comparison.compare_stages(results),
    ]
    if together:
        parts.append(Section("comparison", "Side by side", figures=together))
    counts: dict[str, int] = {}
    for result in results:
        counts[result.kind] = counts.get(result.kind, 0) + 1
    seen: dict[str, int] = {}
    for result in results:
        seen[result.kind] = seen.get(result.kind, 0) + 1
        several = counts[result.kind] > 1
        prefix = f"{result.kind}-{seen[result.kind]}" if several else result.kind
        title = _KIND_TITLES[result.kind] + (f": {result.name}" if several else "")
        parts.append(_section(result, prefix, title))
    gaps = [text for kind, text in _HOW.items() if kind not in counts]
    if not results:
        gaps.insert(0, "No results yet. 'ke-ray demo' makes a whole set in runs/demo.")
    if gaps:
        parts.append(Section("missing", "Not in these results", missing=gaps))
    return parts


def _section(result: Result, prefix: str, title: str) -> Section:
    makers = {"scan": _scan, "continual": _runs, "sweep": _runs, "pretrain": _pretrain}
    parts: dict[str, Any] = makers[result.kind](result, prefix)
    facts = list(parts.pop("facts", []))
    versions = result.manifest.get("versions")
    if isinstance(versions, dict) and versions.get("ke_ray"):
        facts.append(("made with ke_ray", str(versions["ke_ray"])))
    if result.manifest.get("created_at"):
        facts.append(("started", str(result.manifest["created_at"])))
    return Section(
        id=prefix,
        title=title,
        intro=f"{result.path}" + (f" — {result.command}" if result.command else ""),
        notes=result.notes,
        facts=facts,
        **parts,
    )


def _scan(scan: Result, prefix: str) -> dict[str, Any]:
    measures = series.measures(scan)
    figures = scan_figures(scan, prefix)
    facts: list[tuple[str, str]] = []
    if measures:
        facts.append(("checkpoints", number(len(series.checkpoints(scan)))))
        for corpus in series.corpora(scan):
            if caution := series.caution(scan, corpus):
                facts.append((f"caution, {corpus}", caution))
        measure = "knowledge_entropy" if "knowledge_entropy" in measures else measures[0]
        curves = [
            (label, c, corpus) for label, c in series.curves(scan) for corpus in series.corpora(c)
        ]
        for label, curve, corpus in curves:
            change = series.paired_change(curve, measure, corpus)
            if len(change) > 1:
                last = change.iloc[-1]
                half = series.critical_t(curve, corpus) * last["stderr"]
                error = f" ± {half:.2g}" if math.isfinite(half) else ""
                interval = " (95 %)" if error else ""
                title, unit, _ = series.declared(scan, measure)
                facts.append(
                    (
                        f"{title}, first to last, {corpus}"
                        + (f", {label}" if label else "")
                        + interval,
                        f"{last['value']:+.4g}{error} {unit}".replace("-", "−"),
                    )
                )
    broken, copies = failures(scan), duplicates(scan)
    if not broken.empty:
        facts.append(("failed checkpoints", number(len({row[0] for row in broken.rows}))))
    missing = []
    if not measures:
        missing.append("No checkpoint has been scored yet, so there is no figure.")
    else:
        absent = series.absent(scan)
        # Nobody misses the measures of experts in a dense model.
        of_any = (name for name in series.MEASURE_TITLES if not MEASURES[name].by_expert)
        wanted = [name for name in of_any if name not in {*measures, *absent}]
        missing += [*absent.values(), *(_why_missing(scan, name) for name in wanted)]
        if scan.table("replicates").empty:
            missing.append("Paired errors of changes: no leave-one-out values to read.")
        if not any(figure.id.endswith("-distribution") for figure in figures):
            missing.append(
                "Coefficient distributions: no coefficients/ file of the first, middle or last "
                "checkpoint."
            )
        if all(series.ceiling(curve) is None for _, curve in series.curves(scan)):
            missing.append(
                "Ceiling of knowledge entropy: neither manifest nor coefficients/ tell d_mlp."
            )
    tables = [("Failed checkpoints", broken), ("Same weights under two names", copies)]
    return {"facts": facts, "figures": figures, "tables": tables, "missing": missing}


def _why_missing(scan: Result, measure: str) -> str:
    title, requested = series.MEASURE_TITLES[measure][0], scan.manifest.get("measures")
    if not isinstance(requested, list):
        return f"{title}: not in the results."
    if measure in requested:
        return f"{title}: requested, but no checkpoint has it yet."
    return f"{title}: not requested ('--measures {measure}')."


def _runs(study: Result, prefix: str) -> dict[str, Any]:
    make = continual_figures if study.kind == "continual" else sweep_figures
    figures, missing = make(study, prefix)
    frame, failed = runs.good_runs(study), runs.failed_runs(study)
    word = "runs" if study.kind == "continual" else "trials"
    facts = [(f"{word} finished", number(len(frame)))]
    facts += [
        (f"{word} {status}", number(int(count)))
        for status, count in failed["status"].value_counts().items()
    ]
    key = runs.run_key(study)
    rows = [
        [
            row[key],
            row["status"],
            row["error"] or ("–" if row["status"] == "stopped" else "no reason recorded"),
        ]
        for row in failed.to_dict("records")
    ]
    tables = [
        (f"{word.capitalize()} that did not finish", TextTable((key, "status", "error"), rows)),
        (f"All finished {word}", _run_table(frame, key)),
    ]
    return {"facts": facts, "figures": figures, "tables": tables, "missing": missing}


def _run_table(frame: pd.DataFrame, key: str) -> TextTable:
    columns = [key, "checkpoint", "seed", "variant", *runs.RUN_COLUMNS]
    filled = [name for name in columns if name in frame and frame[name].notna().any()]
    heads = [
        f"{runs.RUN_COLUMNS[name][0]} ({runs.RUN_COLUMNS[name][1]})".replace(" ()", "")
        if name in runs.RUN_COLUMNS
        else name
        for name in filled
    ]
    rows = [
        [
            number(row[name] * runs.RUN_COLUMNS[name][2])
            if name in runs.RUN_COLUMNS
            else (number(row[name]) if isinstance(row[name], float) else row[name])
            for name in filled
        ]
        for row in frame.to_dict("records")
    ]
    return TextTable(heads, rows)


def _pretrain(result: Result, prefix: str) -> dict[str, Any]:
    table = result.table("train")
    if table.empty or not {"step", "loss"} <= set(table.columns):
        return {"figures": [], "missing": ["Training loss: no rows in train.parquet yet."]}
    runs_of = table.groupby("run" if "run" in table else lambda _: "run")
    rows = pd.concat(
        part.sort_values("step").iloc[:: math.ceil(len(part) / 1000)].assign(series=str(run))
        for run, part in runs_of
    )
    figures = []
    for column, title, axis in (
        ("loss", "Training loss", "loss (nats per token)"),
        ("learning_rate", "Learning rate", "learning rate"),
    ):
        if column not in table:
            continue
        plot = series_plot(
            rows[["series", "step"]].assign(value=rows[column]), X("step", "pretraining step"), axis
        )
        figures.append(
            figure_of(
                result,
                prefix,
                column.replace("_", "-"),
                title=title,
                caption="Every logged step is drawn."
                if len(rows) == len(table)
                else "At most 1,000 evenly spaced steps of a run are drawn.",
                panels=[Panel((), plot)],
            )
        )
    tokens = table["num_tokens"].max() if "num_tokens" in table else math.nan
    facts = [("steps", number(float(table["step"].max()))), ("tokens", number(float(tokens)))]
    return {"facts": facts, "figures": figures, "missing": []}
