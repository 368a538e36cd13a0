"""What may be compared between results, and what must not be.

Two scans are laid over each other where they share data and measure version, and the thresholds of
a measure that has any. Numbers in different dtypes, and of resuscitated checkpoints, may be
compared: their lines and the caption say so. Everything else is refused with a warning. Studies
that start from several stages are laid over each other in A and F, which are shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ke_ray.report import runs, series
from ke_ray.report.axis import TITLES
from ke_ray.report.charts.figure import Figure, Panel
from ke_ray.report.charts.plot import X, series_plot
from ke_ray.report.charts.scan import band_caption, measure_axis, x_title
from ke_ray.report.sources import Result

# A setting in a scan's manifest -> the measures that it changes; None stands for all.
_DECISIVE: dict[str, tuple[str, ...] | None] = {
    "measure_version": None,
    "top_k_fraction": ("top_k_mass",),
    "dormant_threshold": ("dormant_share",),
}


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Path -> the fewest last parts of it that no other result's path ends in."""
    parts = {result.path: result.path.rstrip("/").split("/") for result in results}
    made = {}
    for path, own in parts.items():
        others = [other for name, other in parts.items() if name != path]
        count = 1
        while count < len(own) and any(other[-count:] == own[-count:] for other in others):
            count += 1
        made[path] = "/".join(own[-count:])
    return made


def warnings(results: Sequence[Result]) -> list[str]:
    """Sentences about results that look comparable and are not."""
    messages: list[str] = []
    scans = [result for result in results if result.kind == "scan" and series.measures(result)]
    for scan in scans:
        for corpus in series.corpora(scan):
            hashes = series.data_hashes(scan, corpus)
            if len(hashes) > 1:
                messages.append(
                    f"{scan.path} holds corpus '{corpus}' with {len(hashes)} data hashes "
                    f"({_few(hashes)}): its checkpoints were not scored on the same instances and "
                    "must not be compared with one another."
                )
    for index, one in enumerate(scans):
        for other in scans[index + 1 :]:
            messages += _data_warnings(one, other)
            messages += _setting_warnings(one, other)
    return messages


def _data_warnings(one: Result, other: Result) -> list[str]:
    mine = {h for corpus in series.corpora(one) for h in series.data_hashes(one, corpus)}
    theirs = {h for corpus in series.corpora(other) for h in series.data_hashes(other, corpus)}
    if mine and theirs and not mine & theirs:
        return [
            f"{one.path} and {other.path} were scored on different data "
            f"({_few(sorted(mine))} against {_few(sorted(theirs))}): knowledge entropy "
            "depends on the data, so their values must not be compared."
        ]
    messages = []
    for corpus in [name for name in series.corpora(one) if name in series.corpora(other)]:
        a, b = series.data_hashes(one, corpus), series.data_hashes(other, corpus)
        if a and b and set(a) != set(b):
            messages.append(
                f"Corpus '{corpus}' is not the same data in {one.path} and {other.path} "
                f"({_few(a)} against {_few(b)}): do not compare it between them."
            )
    return messages


def _setting_warnings(one: Result, other: Result) -> list[str]:
    messages = []
    shared = [name for name in series.measures(one) if name in series.measures(other)]
    for name, affected in _DECISIVE.items():
        a, b = series.setting(one, name), series.setting(other, name)
        touched = [measure for measure in shared if affected is None or measure in affected]
        if a != b and touched:
            what = "their values" if affected is None else f"their {', '.join(touched)}"
            messages.append(
                f"{one.path} has {name} {_shown(a)}, {other.path} has {_shown(b)}: {what} must "
                "not be compared."
            )
    if _dtype(one) != _dtype(other) and shared:
        messages.append(
            f"{one.path} was computed in {_dtype(one)}, {other.path} in {_dtype(other)}: their "
            "values also differ by rounding, which can be as large as an early change over steps."
        )
    if _resuscitation(one) != _resuscitation(other) and shared:
        messages.append(
            f"{one.path} holds {_resuscitation(one)} checkpoints, {other.path} "
            f"{_resuscitation(other)} ones."
        )
    return messages


def _few(hashes: Sequence[str]) -> str:
    return ", ".join(value[:10] + "…" for value in hashes[:3])


def _shown(value: object) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _text_setting(scan: Result, name: str) -> object:
    for part in (scan.manifest.get("identity"), scan.manifest.get("config"), scan.manifest):
        if isinstance(part, dict) and part.get(name) is not None:
            return part[name]
    return None


def _dtype(scan: Result) -> str:
    return str(_text_setting(scan, "dtype") or "an unknown dtype")


def _resuscitation(scan: Result) -> str:
    settings = _text_setting(scan, "resuscitation")
    if not isinstance(settings, dict):
        return "unchanged"
    shown = ", ".join(
        f"{name} {settings[name]}"
        for name in ("ratio", "factor", "control")
        if settings.get(name) not in (None, "none")
    )
    return f"resuscitated ({shown})"


def _key(scan: Result, corpus_hash: str, measure: str) -> tuple[object, ...]:
    """Scans are laid over each other where this is equal."""
    decisive = [
        series.setting(scan, name)
        for name, affected in _DECISIVE.items()
        if affected is None or measure in affected
    ]
    return (corpus_hash, x_title(scan), *decisive)


def compare_scans(results: Sequence[Result]) -> list[Figure]:
    """Totals of several comparable scans, side by side; empty where none are comparable."""
    scans = [result for result in results if result.kind == "scan" and series.measures(result)]
    measures = list(dict.fromkeys(name for scan in scans for name in series.measures(scan)))
    panels, all_rows = [], []
    drawn: dict[str, Result] = {}
    for measure in sorted(measures, key=lambda name: [*series.MEASURE_TITLES, name].index(name)):
        groups: dict[tuple[object, ...], list[tuple[Result, str]]] = {}
        for scan in scans:
            for corpus in series.corpora(scan):
                hashes = series.data_hashes(scan, corpus)
                if len(hashes) == 1 and not series.totals(scan, measure, corpus).empty:
                    groups.setdefault(_key(scan, hashes[0], measure), []).append((scan, corpus))
        for key, group in groups.items():
            if len({scan.path for scan, _ in group}) < 2:
                continue
            title, axis = measure_axis(group[0][0], measure)
            rows = _rows(group, measure)
            x = X("x", str(key[1]))
            plot = series_plot(rows, x, axis, columns={"checkpoint": "checkpoint"})
            panels.append(Panel((title, f"data {str(key[0])[:10]}…"), plot))
            all_rows.append(rows.assign(series=rows["series"] + measure))
            drawn |= {scan.path: scan for scan, _ in group}
    if not panels:
        return []
    return [
        Figure(
            id="compare-scans",
            title="Scans on the same data, side by side",
            caption="Only values on the same data, of the same measure version and thresholds, "
            "are laid over each other. "
            + _differences(list(drawn.values()))
            + band_caption(pd.concat(all_rows), "jackknife standard errors"),
            panels=panels,
            controls=("measure", "data"),
            source=", ".join(drawn),
            wide=True,
        )
    ]


def _differences(scans: Sequence[Result]) -> str:
    """Sentences for the caption on what the scans that are drawn differ in."""
    names = labels(scans)
    text = ""
    for property_of in (_dtype, _resuscitation):
        if len({property_of(scan) for scan in scans}) > 1:
            each = "; ".join(f"{names[scan.path]}: {property_of(scan)}" for scan in scans)
            text += f"They differ: {each}. "
    return text


def _rows(group: Sequence[tuple[Result, str]], measure: str) -> pd.DataFrame:
    """One row per scan, corpus and checkpoint, with 95 % intervals."""
    names = labels([scan for scan, _ in group])
    several = len({_dtype(scan) for scan, _ in group}) > 1
    parts = []
    curves = [(scan, corpus, *part) for scan, corpus in group for part in series.curves(scan)]
    for scan, corpus, label, curve in curves:
        rows = series.totals(curve, measure, corpus)
        error = series.critical_t(scan, corpus) * rows["stderr"]
        dtype = f", {_dtype(scan)}" if several else ""
        of_curve = f", {label}" if label else ""
        parts.append(
            rows.assign(
                series=f"{names[scan.path]} ({corpus}{of_curve}{dtype})",
                low=rows["value"] - error,
                high=rows["value"] + error,
            )
        )
    return pd.concat(parts, ignore_index=True)


def compare_stages(results: Sequence[Result]) -> list[Figure]:
    """A and F by stage of several studies (1B beside 7B, PubMed beside C4); empty for fewer."""
    studies = [result for result in results if result.kind in ("continual", "sweep")]
    names = labels(studies)
    parts = []
    for study in studies:
        frame = runs.good_runs(study)
        frame = frame[frame["variant"] == "original"]
        if "checkpoint" not in frame or frame["checkpoint"].nunique() < 2:
            continue
        settings = [name.removeprefix("original") for name in runs.setting_names(study, frame)]
        name = names[study.path]
        parts.append(frame.assign(series=[f"{name}{setting}" for setting in settings], of=name))
    if len(parts) < 2:
        return []
    rows = pd.concat(parts, ignore_index=True)
    panels = []
    for column in ("acquisition", "forgetting"):
        title, unit, _ = runs.RUN_COLUMNS[column]
        for counted, own in rows.groupby("unit", sort=False):
            mean = runs.aggregate(own, ["series", "x"], column)
            if own["of"].nunique() < 2 or mean.empty:
                continue
            x = X("x", f"{TITLES[counted]} of the start")
            plot = series_plot(mean, x, f"{title} ({unit})", bars=True)
            panels.append(Panel((f"{title}, by {counted}",), plot))
    if not panels:
        return []
    return [
        Figure(
            id="compare-stages",
            title="Studies by starting stage, side by side",
            caption="Unchanged starts alone. Bars: 95 % Student interval over the runs of a start, "
            "or a single run's bootstrap interval. A and F are shares of each study's own K and P: "
            "their trends compare, whatever the models and the corpora.",
            panels=panels,
            controls=("shown",),
            paper="Fig. 4, 6, 13",
            source=", ".join(study.path for study in studies),
            wide=True,
        )
    ]
