"""Tables of pretraining and continual-learning folders, and how they are written.

Losses in nats per token, probe log probabilities in nats, times in seconds, accuracies as
fractions. ``run`` names one training run; ``step`` counts its updates, except in ``runs`` where it
is the pretraining step of the starting checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ke_ray import storage

if TYPE_CHECKING:
    import pyarrow

__all__ = ["TABLES", "to_table", "write_tables"]

_TRAIN = {
    "run": "string",
    "step": "int64",
    "num_tokens": "int64",
    "loss": "float64",
    "learning_rate": "float64",
    "grad_norm": "float64",
    "tokens_per_s": "float64",
    "elapsed_s": "float64",
}

#: table → column → type name of pyarrow.
TABLES: Mapping[str, Mapping[str, str]] = {
    "train": _TRAIN,
    "runs": {
        "run": "string",
        "checkpoint": "string",
        "step": "int64",
        "seed": "int64",
        "corpus": "string",
        "resuscitation_ratio": "float64",
        "amplifying_factor": "float64",
        "control": "string",
        "status": "string",
        "error": "string",
        "acquisition": "float64",
        "acquisition_low": "float64",
        "acquisition_high": "float64",
        "acquisition_summed": "float64",
        "forgetting": "float64",
        "forgetting_low": "float64",
        "forgetting_high": "float64",
        "acquisition_vs_original": "float64",
        "acquisition_vs_original_low": "float64",
        "acquisition_vs_original_high": "float64",
        "forgetting_vs_original": "float64",
        "forgetting_vs_original_low": "float64",
        "forgetting_vs_original_high": "float64",
        "probe_logprob_original": "float64",
        "probe_logprob_before": "float64",
        "probe_logprob_after": "float64",
        "downstream_original": "float64",
        "downstream_before": "float64",
        "downstream_after": "float64",
        "perplexity_before": "float64",
        "perplexity_after": "float64",
        "knowledge_entropy_original_nats": "float64",
        "knowledge_entropy_predicted_nats": "float64",
        "knowledge_entropy_before_nats": "float64",
        "knowledge_entropy_after_nats": "float64",
        "num_steps": "int64",
        "num_tokens": "int64",
        "duration_s": "float64",
        "final_checkpoint": "string",
        "mlflow_run_id": "string",
    },
    "probes": {
        "run": "string",
        "step": "int64",
        "setting": "string",
        "level": "string",
        "num_probes": "int64",
        "logprob_per_token": "float64",
        "logprob_summed": "float64",
    },
    "probe_items": {
        "run": "string",
        "step": "int64",
        "setting": "string",
        "instance": "int64",
        "level": "string",
        "probe": "int64",
        "num_target_tokens": "int64",
        "logprob_summed": "float64",
    },
    "injections": {
        "run": "string",
        "step": "int64",
        "row": "int64",
        "setting": "string",
        "instance": "int64",
        "version": "int64",
        "num_tokens": "int64",
    },
    "dynamics": {
        "run": "string",
        "setting": "string",
        "level": "string",
        "injection": "int64",
        "step": "int64",
        "num_paragraphs": "int64",
        "baseline_step": "int64",
        "lam_step": "int64",
        "effectivity": "float64",
        "effectivity_low": "float64",
        "effectivity_high": "float64",
        "decay": "float64",
    },
    "retainability": {
        "run": "string",
        "setting": "string",
        "level": "string",
        "injection": "int64",
        "lag": "int64",
        "retainability": "float64",
    },
    "downstream": {
        "run": "string",
        "when": "string",
        "task": "string",
        "metric": "string",
        "value": "float64",
        "stderr": "float64",
        "num_items": "int64",
    },
    "perplexity": {
        "run": "string",
        "when": "string",
        "corpus": "string",
        "perplexity": "float64",
        "nats_per_token": "float64",
        "num_tokens": "int64",
    },
}


def to_table(
    name: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> pyarrow.Table:
    """Rows as a table with the schema of ``name`` (or ``columns``); missing values are null.

    Raises:
        KeyError: a row holds a column that the schema does not have.
    """
    import pyarrow

    schema = columns or TABLES[name]
    kept = list(rows)
    for row in kept:
        for column in row:
            if column not in schema:
                raise KeyError(f"table '{name}' has no column '{column}'")
    types = pyarrow.schema([(column, getattr(pyarrow, t)()) for column, t in schema.items()])
    return pyarrow.Table.from_pylist([dict(row) for row in kept], schema=types)


def write_tables(folder: str, records: Mapping[str, list[dict[str, Any]]], run: str) -> None:
    """Write ``<table>.parquet`` for each of ``records``, ``run`` filled in."""
    for name, rows in records.items():
        table = to_table(name, ({"run": run, **row} for row in rows))
        storage.write_table(storage.join(folder, f"{name}.parquet"), table)
