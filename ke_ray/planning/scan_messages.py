"""The rows of a scan's Ray Data pipeline: what goes to a scorer and what comes back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from ke_ray.core.architecture import Architecture
from ke_ray.core.intervention import NUM_INSTANCES, NUM_SEEDS
from ke_ray.planning.scan_items import WorkItem
from ke_ray.planning.scan_rows import evaluated_tables
from ke_ray.secrets import redact
from ke_ray.studies.own_measure import OwnMeasure
from ke_ray.studies.parts import Resuscitation

if TYPE_CHECKING:
    import torch

    from ke_ray.core.statistics import GroupSums

#: Status of an item that was neither scored nor failed, since its store was out of order.
OUTAGE = "outage"

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
    intervention_instances: int = NUM_INSTANCES
    noise_seeds: int = NUM_SEEDS


def evaluated_columns(
    sums: GroupSums, measures: Sequence[str], settings: ScorerSettings
) -> dict[str, Any]:
    """Rows, replicates and mean coefficients of complete sums, ready to travel.

    Raises:
        CheckpointError: a value is not finite.
    """
    tables = evaluated_tables(
        sums,
        measures,
        top_k_fraction=settings.top_k_fraction,
        dormant_threshold=settings.dormant_threshold,
    )
    columns: dict[str, Any] = {
        "rows": _to_ipc(tables.rows),
        "replicates": _to_ipc(tables.replicates),
        "num_instances": sums.total_instances,
        "num_tokens": sums.total_tokens,
    }
    if tables.coefficients is not None:
        columns["coefficients"] = save_tensors({"mean_abs_coefficients": tables.coefficients})
    if tables.experts is not None:
        columns["experts"] = _to_ipc(tables.experts)
    return columns


def failed_table(item: WorkItem, message: str, status: str = "failed") -> pa.Table:
    failure = {
        "item": item.index,
        "checkpoint": item.checkpoint,
        "status": status,
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
