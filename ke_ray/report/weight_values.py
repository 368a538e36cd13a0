"""Values of ``weights.parquet`` by checkpoint, to stand beside the measures of a scan.

One value per column and part (`ffn`, `attention`): the mean over the matrices of all layers that
have one. No data enter, so these hold for every corpus.
"""

from __future__ import annotations

import pandas as pd

from ke_ray.report.sources import Result
from ke_ray.results.columns import TABLES

_PARTS = {"ffn": "FFN matrices", "attention": "attention matrices"}

#: Name → (part, column, title).
WEIGHT_VALUES = {
    f"{part}_{column.name}": (part, column.name, f"{column.title}, {words}")
    for part, words in _PARTS.items()
    for column in TABLES["weights"]
    if column.title
}


def weight_values(scan: Result) -> pd.DataFrame:
    """One row per checkpoint, a column for each of `WEIGHT_VALUES` that has values."""
    table = scan.table("weights")
    if table.empty:
        return pd.DataFrame(columns=["checkpoint"])
    table = table[table["status"] == "ok"]
    values = {
        name: table[table["part"] == part].groupby("checkpoint")[column].mean()
        for name, (part, column, _) in WEIGHT_VALUES.items()
        if column in table
    }
    frame = pd.DataFrame({name: own for name, own in values.items() if own.notna().any()})
    return frame.rename_axis("checkpoint").reset_index()
