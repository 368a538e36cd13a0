"""What may be compared between results, and what must not be."""

from __future__ import annotations

from collections.abc import Sequence

from ke_ray.report import series
from ke_ray.report.charts import Chart, Figure, Line, Panel
from ke_ray.report.scan_figures import x_title
from ke_ray.report.sources import Result

__all__ = ["compare_scans", "data_hashes", "warnings"]


def data_hashes(scan: Result, corpus: str) -> list[str]:
    """The data fingerprints under one corpus name; more than one means a mixed folder."""
    table = scan.table("entropy")
    rows = table[(table["status"] == "ok") & (table["corpus"] == corpus)]
    return [str(value) for value in rows["data_sha256"].dropna().unique()]


def warnings(results: Sequence[Result]) -> list[str]:
    """Sentences about results that look comparable and are not."""
    found: list[str] = []
    scans = [result for result in results if result.kind == "scan" and series.measures(result)]
    for scan in scans:
        for corpus in series.corpora(scan):
            hashes = data_hashes(scan, corpus)
            if len(hashes) > 1:
                found.append(
                    f"{scan.path} holds corpus '{corpus}' with {len(hashes)} data hashes "
                    f"({_few(hashes)}): its checkpoints were not scored on the same instances and "
                    "must not be compared with one another."
                )
    for place, one in enumerate(scans):
        for other in scans[place + 1 :]:
            mine = {h for corpus in series.corpora(one) for h in data_hashes(one, corpus)}
            theirs = {h for corpus in series.corpora(other) for h in data_hashes(other, corpus)}
            if mine and theirs and not mine & theirs:
                found.append(
                    f"{one.path} and {other.path} were scored on different data "
                    f"({_few(sorted(mine))} against {_few(sorted(theirs))}): knowledge entropy "
                    "depends on the data, so their values must not be compared."
                )
            for corpus in set(series.corpora(one)) & set(series.corpora(other)):
                a, b = data_hashes(one, corpus), data_hashes(other, corpus)
                if a and b and mine & theirs and set(a) != set(b):
                    found.append(
                        f"Corpus '{corpus}' is not the same data in {one.path} and {other.path} "
                        f"({_few(a)} against {_few(b)}): do not compare it between them."
                    )
    return found


def _few(hashes: Sequence[str]) -> str:
    return ", ".join(value[:10] + "…" for value in hashes[:3])


def compare_scans(results: Sequence[Result]) -> list[Figure]:
    """Totals of several scans that share data, side by side; empty where none share any."""
    scans = [result for result in results if result.kind == "scan" and series.measures(result)]
    shared: dict[str, list[tuple[Result, str]]] = {}
    for scan in scans:
        for corpus in series.corpora(scan):
            for value in data_hashes(scan, corpus):
                shared.setdefault(value, []).append((scan, corpus))
    panels = []
    for value, group in shared.items():
        if len({scan.path for scan, _ in group}) < 2:
            continue
        held = [m for m in series.measures(group[0][0]) if m in series.measures(group[1][0])]
        for measure in held:
            title, unit = series.MEASURE_TITLES.get(measure, (measure, ""))
            lines = []
            curves = [(s, c, *part) for s, c in group for part in series.curves(s)]
            for colour, (scan, corpus, label, curve) in enumerate(curves):
                frame = series.totals(curve, measure, corpus)
                y, error = frame["value"].to_numpy(), 1.96 * frame["stderr"].to_numpy()
                name = scan.path.rstrip("/").split("/")[-1]
                lines.append(
                    Line(
                        f"{name} ({corpus}{', ' if label else ''}{label})",
                        frame["x"].to_numpy(),
                        y,
                        y - error,
                        y + error,
                        colour=colour,
                        dash=colour,
                        labels=frame["checkpoint"].to_list(),
                    )
                )
            axis = f"{title.lower()} ({unit})" if unit else title.lower()
            chart = Chart(x_title(group[0][0]), axis, lines)
            panels.append(Panel((title, f"data {value[:10]}…"), chart))
    if not panels:
        return []
    return [
        Figure(
            id="compare-scans",
            title="Scans on the same data, side by side",
            caption="Only scans whose data fingerprints are equal are laid over each other. "
            "Bands: ±1.96 jackknife standard errors.",
            panels=panels,
            controls=("measure", "data"),
            source=", ".join(dict.fromkeys(s.path for g in shared.values() for s, _ in g)),
            wide=True,
        )
    ]
