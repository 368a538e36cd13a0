"""Which measure of a start tells what continual learning makes of it.

Every measure of a scan at the starting checkpoints, and every value of their weights (``ke-ray
weights``, ``report.weight_values``), against what studies measured from there: A, F,
ΔK and ΔP (after − before). A point is one start, the mean over seeds and over studies, of which
each may have a level of its own: several studies of one start are no independent points. A *series*
is the starts of one pretraining run, with an intercept of its own.

Nearly everything trends with pretraining, so that any two quantities correlate. The partial
correlation holds ln(1 + step) (or tokens) and, where the scan has it, the loss fixed.

    kind               Pearson's r, and Spearman's: ranks within a series
    degrees of freedom d = n − 1 − rank(Z), n distinct starts (``core.partial``)
    interval           95 %, Fisher's: tanh(atanh r ± 1.96/√(d − 1)), for d ≥ 2
    p                  t test with d degrees of freedom
    p_holm             Holm's, over all measures and outcomes of one kind and what it holds fixed
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ke_ray import storage
from ke_ray.core.intervals import fisher_interval
from ke_ray.core.partial import fixed_columns, holm, partial_correlation
from ke_ray.core.similarity import average_ranks
from ke_ray.errors import ResultsError
from ke_ray.report import runs, series
from ke_ray.report.correlation import p_value
from ke_ray.report.sources import Result
from ke_ray.report.weight_values import WEIGHT_VALUES, weight_values
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
_LOSS = "loss"


def relate(scan: Result, studies: Sequence[Result], corpus: str | None = None) -> pd.DataFrame:
    """One row per measure, outcome, kind and what is held fixed: the columns of ``relation``.

    Args:
        corpus: that measures were taken on; None: the scan's first.

    Raises:
        ResultsError: what cannot be related: no scan, no continual study, a corpus that is not
            there or mixes data, resuscitated checkpoints, checkpoints of another SPEC, or fewer
            than four starts in common.
    """
    for result, kind in ((scan, "scan"), *((study, "continual") for study in studies)):
        if result.kind != kind:
            raise ResultsError(
                f"'{result.path}' holds results of kind '{result.kind}', expected '{kind}'. Give "
                "one scan, then continual studies that start from its checkpoints."
            )
    for study in studies:
        if not is_same_series(scan, study):
            raise ResultsError(
                f"'{scan.path}' is of '{_spec(scan, 'checkpoints')}' and '{study.path}' starts "
                f"from '{_spec(study, 'starts')}': checkpoints of the same name there need not be "
                "the same. Give a scan of the checkpoints that the study starts from."
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
    measures = [n for n in (*series.measures(scan), *WEIGHT_VALUES) if n in points]
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


def is_same_series(scan: Result, study: Result) -> bool:
    """Whether the starts of a study are checkpoints of the scan; yes where one does not say."""
    given, starts = _spec(scan, "checkpoints"), _spec(study, "starts")
    if given is None or starts is None:
        return True
    entries = scan.manifest.get("checkpoints")
    listed = [entry.get("location") for entry in entries or [] if isinstance(entry, dict)]
    wanted = _place(starts)
    places = [_place(place) for place in (given, *listed) if isinstance(place, str)]
    return any(
        place == wanted or place.startswith(f"{wanted}/") or fnmatch.fnmatchcase(place, wanted)
        for place in places
    )


def _spec(result: Result, key: str) -> str | None:
    config = result.manifest.get("config")
    part = config.get(key) if isinstance(config, dict) else None
    spec = part.get("spec") if isinstance(part, dict) else None
    return spec if isinstance(spec, str) else None


def _place(spec: str) -> str:
    """A SPEC or a location, equal for equal ones: paths are absolute, no revisions of the Hub."""
    plain = spec.strip().removeprefix("hf://").rstrip("/")
    if not storage.is_local(plain):
        return plain
    if not os.path.exists(plain):
        plain = re.split("[@#]", plain)[0]
    return os.path.realpath(plain)


def _points(scan: Result, studies: Sequence[Result], corpus: str) -> pd.DataFrame:
    """One row per start: series, checkpoint, x, every measure, every outcome."""
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
        own = own.merge(weight_values(curve), "left", on="checkpoint")
        starts = own[["checkpoint"]]
        found = [starts.merge(_outcomes(study), on="checkpoint") for study in studies]
        for number, group in enumerate(_linked([frame for frame in found if len(frame)])):
            pooled = own.merge(_pooled(group), on="checkpoint")
            parts.append(pooled.assign(series=f"{label}: {number}"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*OUTCOMES])


def _linked(frames: Sequence[pd.DataFrame]) -> list[list[pd.DataFrame]]:
    """Studies that have starts in common, directly or by others; levels of the rest are unlike."""
    groups: list[list[pd.DataFrame]] = []
    for frame in frames:
        near = [any(frame["checkpoint"].isin(o["checkpoint"]).any() for o in g) for g in groups]
        joined = [o for group, is_near in zip(groups, near, strict=True) if is_near for o in group]
        apart = [group for group, is_near in zip(groups, near, strict=True) if not is_near]
        groups = [*apart, [*joined, frame]]
    return groups


def _pooled(studies: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Outcomes by start, up to a constant: the least squares of start + level of the study.

    Where all studies have all starts it is the mean over studies, each of them centred.
    """
    if len(studies) == 1:
        return studies[0]
    rows = pd.concat([frame.assign(study=str(n)) for n, frame in enumerate(studies)])
    pooled = pd.DataFrame({"checkpoint": sorted(set(rows["checkpoint"]))})
    for outcome in OUTCOMES:
        own = rows[rows[outcome].notna()]
        columns = pd.get_dummies(own[["checkpoint", "study"]], dtype=float, prefix_sep=" ")
        levels = np.linalg.lstsq(columns.to_numpy(), own[outcome].to_numpy(), rcond=None)[0]
        num_starts = own["checkpoint"].nunique()
        # Rounded, so that what is equal stays equal for ranks.
        values = dict(
            zip(sorted(set(own["checkpoint"])), levels[:num_starts].round(12), strict=True)
        )
        pooled[outcome] = pooled["checkpoint"].map(values).astype(float)
    return pooled


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
    row["low"], row["high"] = fisher_interval(r, num_free)
    p = 0.0 if abs(r) == 1 else p_value(r, num_free + 2)
    return row | {"r": r, "p": p}


def _ranks(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    for label in np.unique(labels):
        ranks[labels == label] = average_ranks(values[labels == label])
    return ranks
