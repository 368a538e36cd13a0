"""What a scan holds, arranged as figures need it: one row a checkpoint, in pretraining order.

Checkpoints of one architecture, size, seed and branch make a *curve*, along which the stages of
training follow on (``ke_ray.report.axis``). A scan of several is never drawn, tabled or bounded as
one: :func:`curves` takes it apart.

Changes between checkpoints scored on the same data carry the paired jackknife error of
``ke_ray.core.jackknife``: the errors of the two values are correlated, so the difference itself is
jackknifed over the leave-one-out values that a scan keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load

from ke_ray import storage
from ke_ray.core import jackknife
from ke_ray.core.measure import BUILT_IN
from ke_ray.core.measures import declaration
from ke_ray.errors import StorageError
from ke_ray.report import axis
from ke_ray.report.ceiling import Ceiling
from ke_ray.report.sources import Result

# Measure -> (title, unit as shown on an axis), in the order of display.
MEASURE_TITLES = {measure.name: (measure.title, measure.unit) for measure in BUILT_IN}


def declared(scan: Result, measure: str) -> tuple[str, str, str]:
    """(title, unit, total) of a measure; of one that is not ke_ray's own, as the manifest says."""
    own = declaration(measure)
    if own is not None:
        return own.title, own.unit, own.total
    about = scan.manifest.get("own_measures")
    about = about.get(measure) if isinstance(about, dict) else None
    about = about if isinstance(about, dict) else {}
    return about.get("title", measure), about.get("unit", ""), about.get("total", "only")


_PLACED = "checkpoints in order"
_LEAST_FACTOR = 1.05  # a smaller one is lost in the error of the error itself


def _entropy(scan: Result) -> pd.DataFrame:
    table = scan.table("entropy")
    if table.empty:
        return pd.DataFrame(columns=["checkpoint", "step", "corpus", "layer", "measure", "status"])
    return table


def _good(scan: Result) -> pd.DataFrame:
    table = _entropy(scan)
    return table[(table["status"] == "ok") & table["measure"].notna()]


def _valued(scan: Result) -> pd.DataFrame:
    """The rows of measures that have a meaning where they stand."""
    table = _good(scan)
    return table[table["value"].notna()]


def absent(scan: Result) -> dict[str, str]:
    """Measure → a sentence on the layers where it has no meaning, for measures with such layers."""
    table = _good(scan)
    if "reason" not in table:
        return {}
    rows = table[table["layer"].notna()].drop_duplicates(["series", "layer", "measure"])
    sentences = {}
    for measure, part in rows[rows["reason"].notna()].groupby("measure", sort=False):
        num_layers = int((rows["measure"] == measure).sum())
        reasons = "; ".join(part["reason"].unique())
        sentences[str(measure)] = (
            f"{measure} is null in {len(part)} of {num_layers} layers: {reasons}."
        )
    return sentences


def curves(scan: Result) -> list[tuple[str, Result]]:
    """(label, the scan with the checkpoints of one curve alone), in order; '' where it is one.

    Rows of older folders, which do not know their series, belong to the only one there is. A
    checkpoint that names neither step nor seed ends the only run there is.
    """
    keys = _placed(scan).set_index("checkpoint")
    sizes = keys["series"].dropna().unique()
    keys["series"] = keys["series"].fillna(sizes[0] if len(sizes) == 1 else "size not recorded")
    for _, own in keys.groupby("series"):
        seeds = own.loc[~own["unknown"], "seed"].drop_duplicates()
        if len(seeds) == 1:
            keys.loc[own.index, "seed"] = seeds.iloc[0]
    for _, run in keys.groupby(["series", "seed"], dropna=False):
        if run["branch"].nunique() < 2:  # a single branch goes on along the run
            keys.loc[run.index, "branch"] = None
    columns = ["series", "seed", "branch"]
    groups = [
        (key, set(part.index))
        for key, part in keys.sort_values("series", kind="stable").groupby(
            columns, dropna=False, sort=False
        )
    ]
    if len(groups) < 2:
        return [("", scan)]
    several = {name for name in columns if keys[name].nunique(dropna=False) > 1}
    return [
        (_curve_label(dict(zip(columns, key, strict=True)), several), _restricted(scan, names))
        for key, names in groups
    ]


def _curve_label(key: dict[str, Any], several: set[str]) -> str:
    parts = [key["series"]] if "series" in several else []
    if "seed" in several:
        parts.append(f"seed {key['seed']}" if pd.notna(key["seed"]) else "no seed named")
    if "branch" in several:
        parts.append(key["branch"] if pd.notna(key["branch"]) else "stages in common")
    return ", ".join(parts)


def seeds(parts: Sequence[tuple[str, Result]]) -> dict[str, tuple[str, ...]]:
    """What several seeds of one run have in common → the labels of their ``curves``."""
    runs: dict[str, list[str]] = {}
    for label, curve in parts:
        seed = _placed(curve)["seed"].iloc[0]
        if isinstance(seed, str):
            common = ", ".join(part for part in label.split(", ") if part != f"seed {seed}")
            runs.setdefault(common, []).append(label)
    return {common: tuple(labels) for common, labels in runs.items() if len(labels) > 1}


def _restricted(scan: Result, names: set[str]) -> Result:
    """The scan with the scored rows of these checkpoints alone, placed as before; no failures."""
    tables = {
        name: frame[frame["checkpoint"].isin(names)].reset_index(drop=True)
        for name, frame in scan.tables.items()
        if "checkpoint" in frame
    }
    return dataclasses.replace(scan, tables=tables)


def measures(scan: Result) -> list[str]:
    """The measures that the scan has values of, in the order of display; unknown ones last."""
    names = [str(name) for name in _valued(scan)["measure"].unique()]
    declared = [name for name in MEASURE_TITLES if name in names]
    return declared + sorted(set(names) - set(declared))


def corpora(scan: Result) -> list[str]:
    """Corpus names in the order of the manifest."""
    names = [str(name) for name in _good(scan)["corpus"].dropna().unique()]
    named = scan.manifest.get("corpora")
    first = [name for name in named if name in names] if isinstance(named, dict) else []
    return first + [name for name in names if name not in first]


def data_hashes(scan: Result, corpus: str) -> list[str]:
    """The data fingerprints under one corpus name; more than one means a mixed folder."""
    table = _good(scan)
    rows = table[table["corpus"] == corpus]
    return [str(value) for value in rows["data_sha256"].dropna().unique()]


def _placed(scan: Result) -> pd.DataFrame:
    """The scored checkpoints as ``ke_ray.report.axis.placed``; of a curve, as in the whole scan.

    It is kept as a table of the result, because every figure asks for it.
    """
    if _PLACED not in scan.tables:
        table = _good(scan).drop_duplicates("checkpoint")
        entries = scan.manifest.get("checkpoints")
        listed = [entry for entry in entries if isinstance(entry, dict)] if entries else []
        if "tokens" not in table or table["tokens"].isna().all():  # of an earlier version
            by_name = {entry.get("name"): entry.get("pretraining_tokens") for entry in listed}
            tokens = pd.to_numeric(table["checkpoint"].map(by_name), errors="coerce")
            table = table.assign(tokens=tokens)
        scan.tables[_PLACED] = axis.placed(table, [str(entry.get("name")) for entry in listed])
    return scan.tables[_PLACED]


def checkpoints(scan: Result) -> pd.DataFrame:
    """One row per scored checkpoint, in training order: [checkpoint, step, x].

    ``x`` is how far training had come, see ``ke_ray.report.axis``.
    """
    return _placed(scan)[["checkpoint", "step", "x"]]


def tokens(scan: Result) -> pd.Series | None:
    """Pretraining tokens by checkpoint, where they are known of every one."""
    num_tokens = _placed(scan).set_index("checkpoint")["tokens"]
    return num_tokens if len(num_tokens) and num_tokens.notna().all() else None


def unit(scan: Result) -> str:
    """What ``x`` counts: a key of ``ke_ray.report.axis.TITLES``."""
    units = _placed(scan)["unit"]
    return str(units.iloc[0]) if len(units) else "step"


def borders(scan: Result, column: str = "x") -> dict[float, str]:
    """Where stages end, in ``x`` or in "tokens" → the name of the stage that follows."""
    return axis.borders(_placed(scan), column)


def num_unnumbered(scan: Result) -> int:
    """How many checkpoints stand after the last one because nothing gives their number."""
    return 0 if unit(scan) == "place" else int(_placed(scan)["unknown"].sum())


def totals(scan: Result, measure: str, corpus: str) -> pd.DataFrame:
    """The model-wide value of a measure per checkpoint: [checkpoint, step, x, value, stderr]."""
    table = _valued(scan)
    table = table[
        (table["measure"] == measure) & (table["corpus"] == corpus) & table["layer"].isna()
    ]
    columns = table[["checkpoint", "value", "stderr"]].drop_duplicates("checkpoint")
    return checkpoints(scan).merge(columns, on="checkpoint", how="inner")


def layer_matrix(scan: Result, measure: str, corpus: str) -> tuple[pd.DataFrame, np.ndarray]:
    """(checkpoints with x, values [n_layers, num_checkpoints]); NaN where a value is absent."""
    table = _good(scan)
    table = table[
        (table["measure"] == measure) & (table["corpus"] == corpus) & table["layer"].notna()
    ]
    order = checkpoints(scan)
    order = order[order["checkpoint"].isin(table["checkpoint"])].reset_index(drop=True)
    if table.empty:
        return order, np.empty((0, len(order)))
    layers = range(int(table["layer"].max()) + 1)
    values = table.pivot_table(index="layer", columns="checkpoint", values="value", aggfunc="first")
    return order, values.reindex(layers, columns=order["checkpoint"]).to_numpy(dtype=float)


def failed(scan: Result) -> pd.DataFrame:
    """The rows of checkpoints that could not be scored: [checkpoint, step, corpus, error]."""
    table = _entropy(scan)
    if "error" not in table.columns:
        return pd.DataFrame(columns=["checkpoint", "step", "corpus", "error"])
    rows = table[table["status"] != "ok"]
    return rows[["checkpoint", "step", "corpus", "error"]].drop_duplicates(ignore_index=True)


def setting(scan: Result, name: str) -> float | None:
    """A number that the manifest holds at its top, in its identity or in its configuration."""
    for part in (scan.manifest, scan.manifest.get("identity"), scan.manifest.get("config")):
        value = part.get(name) if isinstance(part, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def _of_rows(scan: Result, name: str) -> float | None:
    """A size that the rows hold; None where they hold none, or several."""
    table = _good(scan)
    values = list(table[name].dropna().unique()) if name in table else []
    return float(values[0]) if len(values) == 1 else None


def num_layers(scan: Result) -> int:
    """Layers of the model, from the manifest or from the rows."""
    n_layers = _of_rows(scan, "n_layers") or setting(scan, "n_layers")
    if n_layers:
        return int(n_layers)
    layers = _good(scan)["layer"].dropna()
    return int(layers.max()) + 1 if len(layers) else 0


def ceiling(scan: Result) -> Ceiling | None:
    """From the rows, the manifest, or a coefficients file; None where none of them tells."""
    widths = _layer_widths(scan)
    d_mlp = _of_rows(scan, "d_mlp") or setting(scan, "d_mlp")
    if len(set(widths)) < 2 and d_mlp:
        widths = [int(d_mlp)] * num_layers(scan)
    if not widths:
        folder = storage.join(scan.path, "coefficients")
        kept = set(storage.list_dir(folder))
        for name in checkpoints(scan)["checkpoint"]:
            if f"{storage.slug(name)}.safetensors" in kept:
                array = coefficients(scan, name)
                if array is not None and array.ndim == 2:
                    widths = [int(width) for width in (~np.isnan(array)).sum(axis=1)]
                break
    counts = Counter(width for width in widths if width > 1)
    return Ceiling(tuple((number, width) for width, number in counts.items())) if counts else None


def _layer_widths(scan: Result) -> list[int]:
    """Memories of every layer that has some, from the rows; empty where they do not agree."""
    table = _good(scan)
    if "d_mlp" not in table:
        return []
    own = table[table["layer"].notna() & (table["d_mlp"] > 0)].groupby("layer")["d_mlp"]
    return [int(width) for width in own.first()] if (own.nunique() == 1).all() else []


def paired_change(scan: Result, measure: str, corpus: str, base: str | None = None) -> pd.DataFrame:
    """Change of a total since checkpoint ``base`` (default: the first one).

    Columns [checkpoint, step, x, value, stderr]; the error is that of the difference (NaN where
    the folder keeps no replicates of the two). Empty where ``base`` was not scored.
    """
    series = totals(scan, measure, corpus)
    origin = series if base is None else series[series["checkpoint"] == base]
    if origin.empty:
        return series.iloc[:0]
    first = origin.iloc[0]
    replicates = scan.table("replicates")
    vectors: dict[str, np.ndarray] = {}
    if not replicates.empty:
        chosen = replicates[
            (replicates["measure"] == measure)
            & (replicates["corpus"] == corpus)
            & replicates["layer"].isna()
        ].sort_values("group")
        vectors = {
            str(name): part["value"].to_numpy(dtype=float)
            for name, part in chosen.groupby("checkpoint")
        }
    sizes = _sizes(scan, corpus)
    table = _good(scan)
    data = table[table["corpus"] == corpus].groupby("checkpoint")["data_sha256"].first()
    changes, errors = [], []
    for _, row in series.iterrows():
        change = row["value"] - first["value"]
        changes.append(change)
        mine, theirs = vectors.get(row["checkpoint"]), vectors.get(first["checkpoint"])
        if row["checkpoint"] == first["checkpoint"]:
            errors.append(0.0)
        elif mine is None or theirs is None or not len(mine) == len(theirs) == len(sizes):
            errors.append(math.nan)
        elif data[row["checkpoint"]] != data[first["checkpoint"]]:
            errors.append(math.nan)  # not the same instances, so there is no paired error
        else:
            errors.append(float(jackknife.standard_error(change, mine - theirs, sizes)))
    return series.assign(value=changes, stderr=errors)


def critical_t(scan: Result, corpus: str) -> float:
    """How many jackknife standard errors on either side are a 95 % interval on a corpus."""
    return jackknife.critical_t(_sizes(scan, corpus))


def about_corpus(scan: Result, corpus: str) -> dict[str, Any]:
    """What the manifest says of a corpus; empty where it says nothing."""
    about = scan.manifest.get("corpora")
    about = about.get(corpus) if isinstance(about, dict) else None
    return about if isinstance(about, dict) else {}


def caution(scan: Result, corpus: str) -> str | None:
    """What weakens the errors of a corpus, in words; None where they stand as they are."""
    about, found = about_corpus(scan, corpus), []
    factor = about.get("stderr_factor")
    if isinstance(factor, int | float) and factor > _LEAST_FACTOR:
        remedy = " (sampling: spread avoids it)" if about.get("sampling") == "first" else ""
        found.append(
            f"Documents are cut between groups of instances: errors may be up to {factor:.1f} "
            f"times too small{remedy}."
        )
    elif "sampling" not in about and about.get("eos_token_id") is not None:
        found.append(
            "The instances are the first of their source, neighbours share documents: errors may "
            "be several times too small (a new scan spreads them)."
        )
    if about.get("note"):
        found.append(str(about["note"]))
    return " ".join(found) or None


def _sizes(scan: Result, corpus: str) -> np.ndarray:
    sizes = about_corpus(scan, corpus).get("group_sizes")
    if isinstance(sizes, list):
        return np.array(sizes, dtype=np.int64)
    table = _good(scan)
    counts = table.loc[table["corpus"] == corpus, "num_instances"].dropna()
    return jackknife.group_sizes(int(counts.iloc[0])) if len(counts) else np.empty(0, np.int64)


def coefficients(scan: Result, checkpoint: str, corpus: str | None = None) -> np.ndarray | None:
    """``mean_abs_coefficients`` [n_layers, d_mlp] float32 of one checkpoint; None where not kept.

    NaN beyond the memories of a layer that is narrower than the widest.
    ``corpus`` None means the scan's first corpus.
    """
    name = storage.slug(checkpoint) if corpus is None else f"{storage.slug(checkpoint)}@{corpus}"
    path = storage.join(scan.path, "coefficients", f"{name}.safetensors")
    try:
        is_kept = storage.exists(path)
    except StorageError:  # others may name a corpus as no file can be named
        is_kept = False
    return load(storage.read_bytes(path)).get("mean_abs_coefficients") if is_kept else None
