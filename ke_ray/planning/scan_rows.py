"""Rows of a scan's tables, from the sums of one checkpoint on one corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ke_ray.core.measures import evaluate
from ke_ray.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from ke_ray.core.measures import Evaluation
    from ke_ray.core.statistics import GroupSums


@dataclass(frozen=True)
class EvaluatedTables:
    """What a scan writes of one checkpoint on one corpus, without what names these two.

    Attributes:
        rows, replicates: of ``entropy.parquet`` and ``replicates.parquet``.
        coefficients: C̄ float32 [n_layers, d_mlp] on the CPU; None where it was not summed.
        experts: of ``experts.parquet``; None of dense models.
    """

    rows: pa.Table
    replicates: pa.Table
    coefficients: torch.Tensor | None
    experts: pa.Table | None


def evaluated_tables(
    sums: GroupSums, measures: Sequence[str], *, top_k_fraction: float, dormant_threshold: float
) -> EvaluatedTables:
    """Evaluate complete sums.

    Raises:
        CheckpointError: a value is not finite.
    """
    evaluation = evaluate(
        sums, measures, top_k_fraction=top_k_fraction, dormant_threshold=dormant_threshold
    )
    if not evaluation.is_finite():
        bad = next(r for r in evaluation.rows if r.reason is None and not np.isfinite(r.value))
        part = "its total" if bad.layer is None else f"layer {bad.layer}"
        raise CheckpointError(
            f"{bad.measure} is {bad.value} at {part}: the activations overflow or the weights "
            "are damaged. Try --dtype float32, or fetch the checkpoint again."
        )
    has_coefficients = "coefficients" in sums.tables
    return EvaluatedTables(
        _rows_table(evaluation),
        _replicates_table(evaluation),
        sums.mean("coefficients").float().cpu() if has_coefficients else None,
        _experts_table(sums) if "expert_load" in sums.tables else None,
    )


def labelled(table: pa.Table, common: Mapping[str, Any], columns: pa.Schema) -> pa.Table:
    """The table with the columns that all of a checkpoint's rows have in common."""
    arrays = [
        table[column.name]
        if column.name in table.column_names
        else pa.repeat(pa.scalar(common[column.name], column.type), table.num_rows)
        for column in columns
    ]
    return pa.Table.from_arrays(arrays, names=columns.names).cast(columns)


def _experts_table(sums: GroupSums) -> pa.Table:
    """One row per layer and expert, in the columns of ``experts`` that are not the checkpoint's."""
    from ke_ray.core.experts import expert_entropies, expert_masses

    means = zip(sums.mean("coefficients"), sums.mean("expert_load"), strict=True)
    tables = []
    for layer, (mean, load) in enumerate(means):
        sizes = sums.layers.expert_sizes[layer]
        if not sum(sizes):
            continue  # no feed-forward part
        masses = expert_masses(mean[: sum(sizes)], sizes)
        entropies = expert_entropies(mean[: sum(sizes)], sizes).cpu().numpy()
        columns = {
            "layer": pa.array([layer] * len(sizes), pa.int32()),
            "expert": pa.array(range(len(sizes)), pa.int32()),
            "num_memories": pa.array(sizes, pa.int32()),
            "load": load[: len(sizes)].cpu().numpy(),
            "mass": (masses / masses.sum()).cpu().numpy(),
            "entropy_nats": pa.array(entropies, pa.float64(), from_pandas=True),
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _rows_table(evaluation: Evaluation) -> pa.Table:
    rows = evaluation.rows
    return pa.table(
        {
            "layer": pa.array([row.layer for row in rows], pa.int32()),
            "measure": [row.measure for row in rows],
            "value": pa.array([row.value for row in rows], pa.float64(), from_pandas=True),
            "stderr": pa.array([row.stderr for row in rows], pa.float64(), from_pandas=True),
            "unit": [row.unit for row in rows],
            "d_mlp": pa.array([row.d_mlp for row in rows], pa.int32()),
            "reason": pa.array([row.reason for row in rows], pa.string()),
        }
    )


def _replicates_table(evaluation: Evaluation) -> pa.Table:
    layers: list[int | None] = []
    measures: list[str] = []
    values = []
    for (layer, measure), replicates in evaluation.replicates.items():
        layers += [layer] * len(replicates)
        measures += [measure] * len(replicates)
        values.append(replicates)
    num_groups = len(evaluation.group_counts)
    groups = np.tile(np.arange(num_groups, dtype=np.int32), len(evaluation.replicates))
    return pa.table(
        {
            "layer": pa.array(layers, pa.int32()),
            "measure": pa.array(measures, pa.string()),
            "group": groups,
            "value": np.concatenate(values) if values else np.empty(0),
        }
    )
