"""The rows of a scan's Ray Data pipeline: what goes to a scorer and what comes back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from ke_ray.core.architecture import Architecture
from ke_ray.core.measures import evaluate
from ke_ray.errors import CheckpointError
from ke_ray.planning.scan_items import WorkItem
from ke_ray.secrets import redact
from ke_ray.studies.own_measures import OwnMeasure
from ke_ray.studies.parts import Resuscitation

if TYPE_CHECKING:
    import torch

    from ke_ray.core.measures import Evaluation
    from ke_ray.core.statistics import GroupSums

OUTPUT_SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("checkpoint", pa.int64()),
        ("corpus", pa.string()),
        # The instances of the corpus that were scored.
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("num_instances", pa.int64()),
        ("num_tokens", pa.int64()),
        ("weights_sha256", pa.string()),
        ("series", pa.string()),
        ("n_layers", pa.int32()),
        # Either partial sums (safetensors), or, where the item is all of the corpus, their
        # evaluation: rows and replicates (Arrow IPC), mean coefficients (safetensors) and, of a
        # mixture, load and mass of its experts (Arrow IPC).
        ("sums", pa.large_binary()),
        ("rows", pa.large_binary()),
        ("replicates", pa.large_binary()),
        ("coefficients", pa.large_binary()),
        ("experts", pa.large_binary()),
        # JSON of what resuscitation was predicted to do; on an item's first row.
        ("resuscitation", pa.string()),
        ("fetch_s", pa.float64()),
        ("load_s", pa.float64()),
        ("score_s", pa.float64()),
        ("wait_s", pa.float64()),
    ]
)


@dataclass(frozen=True)
class ScorerSettings:
    """What every scorer of a scan needs to know."""

    dtype: str
    batch_size: int
    top_k_fraction: float
    dormant_threshold: float
    device: Literal["auto", "cuda", "cpu"]
    threads: int | None
    cache_dir: str | None
    cache_bytes: int | None
    resuscitation: Resuscitation | None = None
    architecture: Architecture | None = None
    matmul_precision: str = "highest"
    own_measures: tuple[OwnMeasure, ...] = ()


def evaluated_columns(
    sums: GroupSums, measures: Sequence[str], settings: ScorerSettings
) -> dict[str, Any]:
    """Rows, replicates and mean coefficients of complete sums, ready to travel.

    Raises:
        CheckpointError: a value is not finite.
    """

    evaluation = evaluate(
        sums,
        measures,
        top_k_fraction=settings.top_k_fraction,
        dormant_threshold=settings.dormant_threshold,
    )
    if not evaluation.is_finite():
        bad = next(r for r in evaluation.rows if r.reason is None and not np.isfinite(r.value))
        part = "its total" if bad.layer is None else f"layer {bad.layer}"
        raise CheckpointError(
            f"{bad.measure} is {bad.value} at {part}: the activations overflow or the weights "
            "are damaged. Try --dtype float32, or fetch the checkpoint again."
        )
    columns: dict[str, Any] = {
        "rows": _to_ipc(_rows_table(evaluation)),
        "replicates": _to_ipc(_replicates_table(evaluation)),
        "num_instances": evaluation.num_instances,
        "num_tokens": evaluation.num_tokens,
    }
    if "coefficients" in sums.tables:
        mean = sums.mean("coefficients").float().cpu()
        columns["coefficients"] = save_tensors({"mean_abs_coefficients": mean})
    if "expert_load" in sums.tables:
        columns["experts"] = _to_ipc(_experts_table(sums))
    return columns


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


def failed_table(item: WorkItem, message: str) -> pa.Table:
    failure = {
        "item": item.index,
        "checkpoint": item.checkpoint,
        "status": "failed",
        "error": redact(" ".join(message.split())),
    }
    return output_table([{**failure, "corpus": rows.work.corpus} for rows in item.ranges])


def output_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    names = OUTPUT_SCHEMA.names
    return pa.Table.from_pylist([{n: r.get(n) for n in names} for r in rows], OUTPUT_SCHEMA)


def _to_ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def save_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def sums_from_bytes(payload: bytes) -> GroupSums:
    """The partial sums of an output row."""
    from safetensors.torch import load

    from ke_ray.core.statistics import GroupSums

    return GroupSums.from_tensors(load(payload))
