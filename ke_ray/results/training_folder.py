"""Tables of pretraining and continual-learning folders.

Losses in nats per token, probe log probabilities in nats, times in seconds, accuracies as
fractions. ``run`` names one training run; ``step`` counts its updates, except in ``runs`` where it
is the pretraining step of the starting checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ke_ray import storage
from ke_ray.results.columns import to_table


def write_tables(folder: str, records: Mapping[str, list[dict[str, Any]]], run: str) -> None:
    """Write ``<table>.parquet`` for each of ``records``, ``run`` filled in."""
    for name, rows in records.items():
        table = to_table(name, ({"run": run, **row} for row in rows))
        storage.write_table(storage.join(folder, f"{name}.parquet"), table)
