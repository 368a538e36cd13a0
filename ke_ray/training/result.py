"""What a continual run results in: columns of its row, from its snapshots before and after."""

from __future__ import annotations

import math
from typing import Any

from ke_ray.core.acquisition import Interval
from ke_ray.training.snapshot import Snapshot, acquired, forgotten


def result_columns(
    start: Snapshot, after: Snapshot, original: Snapshot | None = None
) -> dict[str, float | None]:
    """Columns of ``runs.parquet``: A, F and the values that they compare.

    Args:
        start: of the model that was trained.
        after: of the trained model.
        original: of the start before its resuscitation, if it was resuscitated.
    """
    summed = acquired(start, after, summed=True)
    columns = {
        **_interval_columns("acquisition", acquired(start, after)),
        **_interval_columns("forgetting", forgotten(start, after)),
        "probe_logprob_before": start.knowledge,
        "probe_logprob_after": after.knowledge,
        "downstream_before": start.accuracy,
        "downstream_after": after.accuracy,
        "perplexity_before": _perplexity(start),
        "perplexity_after": _perplexity(after),
        "knowledge_entropy_before_nats": start.entropy_nats,
        "knowledge_entropy_after_nats": after.entropy_nats,
        "acquisition_summed": _finite(summed.value) if summed else None,
    }
    if original is not None:
        columns |= {
            **_interval_columns("acquisition_vs_original", acquired(original, after)),
            **_interval_columns("forgetting_vs_original", forgotten(original, after)),
            "probe_logprob_original": original.knowledge,
            "downstream_original": original.accuracy,
            "knowledge_entropy_original_nats": original.entropy_nats,
        }
    return columns


def result_metrics(row: dict[str, Any]) -> dict[str, float]:
    """What MLflow is told of a run's row."""
    names = [name for name in row if name.startswith(("acquisition", "forgetting"))]
    metrics = {f"result/{name}": row[name] for name in names if row[name] is not None}
    before, after = row["knowledge_entropy_before_nats"], row["knowledge_entropy_after_nats"]
    if before is not None and after is not None:
        metrics["result/knowledge_entropy_change_nats"] = after - before
    return metrics


def _interval_columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {
        name: _finite(interval.value),
        f"{name}_low": _finite(interval.low),
        f"{name}_high": _finite(interval.high),
    }


def _perplexity(snapshot: Snapshot) -> float | None:
    return _finite(snapshot.perplexity["perplexity"]) if snapshot.perplexity else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
