"""Which measure of a start tells what continual learning makes of it.

Every measure of a scan at the starting checkpoints against what studies measured from there: A, F,
ΔK and ΔP (after − before). A point is one start of one study, the mean over the study's seeds. A
*series* is the starts of one pretraining run in one study; each has an intercept of its own.

Nearly everything trends with pretraining, so that any two quantities correlate. The partial
correlation holds ln(1 + step) (or tokens) and, where the scan has it, the loss fixed.

    kind               Pearson's r, and Spearman's: ranks within a series
    interval           95 %, percentiles over starts redrawn within each series (seeded)
    p                  t test with n − 1 − rank(Z) degrees of freedom (``core.partial``)
    p_holm             Holm's, over all measures and outcomes of one kind and what it holds fixed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ke_ray.core.partial import fixed_columns, holm, partial_correlation
from ke_ray.core.similarity import average_ranks
from ke_ray.errors import ResultsError
from ke_ray.report import runs, series
from ke_ray.report.correlation import p_value
from ke_ray.report.sources import Result
from ke_ray.results.columns import names

#: Outcome → its symbol.
OUTCOMES = {
    "acquisition": "A",
    "forgetting": "F",
    "knowledge_change": "ΔK",
    "downstream_change": "ΔP",
}
KINDS = ("pearson", "spearman")
LEAST_STARTS = 4  # three points lie near a line by chance
_DRAWS = 500
_LOSS = "loss"


def relate(scan: Result, studies: Sequence[Result], corpus: str | None = None) -> pd.DataFrame:
    """One row per measure, outcome, kind and what is held fixed: the columns of ``relation``.

    Args:
        corpus: that measures were taken on; None: the scan's first.

    Raises:
        ResultsError: what cannot be related: no scan, no continual study, a corpus that is not
            there or mixes data, resuscitated checkpoints, or fewer than four starts in common.
    """
    for result, kind in ((scan, "scan"), *((study, "continual") for study in studies)):
        if result.kind != kind:
            raise ResultsError(
                f"'{result.path}' holds results of kind '{result.kind}', expected '{kind}'. Give "
                "one scan, then continual studies that start from its checkpoints."
            )
    corpora = series.corpora(scan)
    corpus = corpus or (corpora[0] if corpora else None)
    if corpus not in corpora:
        shown = ", ".join(corpora) or "none"
        raise ResultsError(f"'{scan.path}' has no corpus '{corpus}'; it has: {shown}.")
    identity = scan.manifest.get("identity")
    if isinstance(identity, dict) and identity.get("resuscitation"):
        raise ResultsError(
            f"'{scan.path}' is of resuscitated checkpoints, and measures of a start must be those "
            "of the start itself. Give the scan of the unchanged checkpoints."
        )
    points = _points(scan, studies, corpus)
    measures = [name for name in series.measures(scan) if name in points]
    most = max((int(points[name].notna().sum()) for name in OUTCOMES), default=0)
    if most < LEAST_STARTS:
        raise ResultsError(
            f"'{scan.path}' and the {len(studies)} studies have {most} starts in common that were "
            f"scanned on '{corpus}' and learned from; expected at least {LEAST_STARTS}. Scan the "
            "checkpoints that the studies start from, or run studies from more of them."
        )
    rows = [
        row | {"measure": measure, "outcome": outcome, "corpus": corpus}
        for measure in measures
        for outcome in OUTCOMES
        for row in _rows(points, measure, outcome)
    ]
    table = pd.DataFrame(rows)
    adjusted = table.groupby(["kind", "fixed"])["p"].transform(
        lambda part: holm(part.to_numpy(dtype=float))
    )
    return table.assign(p_holm=adjusted)[[*names("relation")]]


def _points(scan: Result, studies: Sequence[Result], corpus: str) -> pd.DataFrame:
    """One row per start and study: series, checkpoint, x, every measure, every outcome."""
    parts = []
    for label, curve in series.curves(scan):
        if corpus not in series.corpora(curve):
            continue
        hashes = series.data_hashes(curve, corpus)
        if len(hashes) > 1:
            raise ResultsError(
                f"'{scan.path}' has corpus '{corpus}' with {len(hashes)} data hashes: its "
                "checkpoints were not scored on the same instances. Scan them again on one corpus."
            )
        own = series.checkpoints(curve)[["checkpoint", "x"]]
        for measure in series.measures(curve):
            values = series.totals(curve, measure, corpus)[["checkpoint", "value"]]
            own = own.merge(values.rename(columns={"value": measure}), "left", on="checkpoint")
        parts += [
            own.merge(_outcomes(study), on="checkpoint").assign(series=f"{label}: {number}")
            for number, study in enumerate(studies)
        ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*OUTCOMES])


def _outcomes(study: Result) -> pd.DataFrame:
    """Means over the seeds of a study, by start: the unchanged ones alone."""
    frame = runs.good_runs(study)
    frame = frame[frame["variant"] == "original"]
    empty = pd.Series(np.nan, frame.index)
    known = {
        name: frame.get(name, empty).astype(float)
        for name in (
            *("acquisition", "forgetting", "probe_logprob_before", "probe_logprob_after"),
            *("downstream_before", "downstream_after"),
        )
    }
    outcomes = pd.DataFrame(
        {
            "checkpoint": frame.get("checkpoint"),
            "acquisition": known["acquisition"],
            "forgetting": known["forgetting"],
            "knowledge_change": known["probe_logprob_after"] - known["probe_logprob_before"],
            "downstream_change": known["downstream_after"] - known["downstream_before"],
        }
    )
    return outcomes.groupby("checkpoint", as_index=False).mean()


def _rows(points: pd.DataFrame, measure: str, outcome: str) -> list[dict[str, Any]]:
    has_loss = _LOSS in points and bool(points[_LOSS].notna().all())
    own = points[points[measure].notna() & points[outcome].notna()]
    own = own[own.groupby("series")["series"].transform("size") > 1]  # one says nothing of itself
    labels = own["series"].to_numpy(dtype=str)
    x, y = (own[name].to_numpy(dtype=float) for name in (measure, outcome))
    others = [np.log1p(own["x"].to_numpy(dtype=float))]
    others += [own[_LOSS].to_numpy(dtype=float)] if has_loss else []
    rows = []
    for kind in KINDS:
        if kind == "spearman":
            x, y, *others = (_ranks(values, labels) for values in (x, y, *others))
        for fixed in ([], others):
            held = "" if not fixed else "step, loss" if has_loss else "step"
            numbers = _related(x, y, labels, fixed)
            rows.append({"kind": kind, "fixed": held, **numbers})
    return rows


def _related(
    x: np.ndarray, y: np.ndarray, labels: np.ndarray, others: Sequence[np.ndarray]
) -> dict[str, Any]:
    row: dict[str, Any] = {"num_starts": len(x), "num_series": len(np.unique(labels))}
    row |= dict.fromkeys(("r", "low", "high", "p"), np.nan)
    fixed = fixed_columns(labels, *others) if len(x) else np.empty((0, 0))
    num_free = len(x) - 1 - (int(np.linalg.matrix_rank(fixed)) if len(x) else 0)
    if num_free < 1:
        return row  # any r fits
    r = float(partial_correlation(x, y, fixed))
    drawn = _redrawn(labels)
    spread = partial_correlation(x[drawn], y[drawn], fixed[drawn])
    if np.isfinite(spread).mean() > 0.5 and np.isfinite(r):
        row["low"], row["high"] = (float(v) for v in np.nanquantile(spread, (0.025, 0.975)))
    p = 0.0 if abs(r) == 1 else p_value(r, num_free + 2)
    return row | {"r": r, "p": p}


def _redrawn(labels: np.ndarray) -> np.ndarray:
    """Indices [draws, n] of starts redrawn within each series."""
    rng = np.random.default_rng(0)
    drawn = np.empty((_DRAWS, len(labels)), dtype=int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        drawn[:, members] = rng.choice(members, (_DRAWS, len(members)))
    return drawn


def _ranks(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    for label in np.unique(labels):
        ranks[labels == label] = average_ranks(values[labels == label])
    return ranks
