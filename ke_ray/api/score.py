"""Measures of a model in hand, as a frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from ke_ray.core.intervention import NUM_INSTANCES, NUM_SEEDS
from ke_ray.models import scoring


def score_model(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    measures: str | Sequence[str] = ("knowledge_entropy",),
    batch_size: int = 4,
    intervention_instances: int = NUM_INSTANCES,
    noise_seeds: int = NUM_SEEDS,
) -> pd.DataFrame:
    """Measure a causal language model of transformers on token ids.

    See :func:`ke_ray.models.scoring.score_model`, whose values, arguments and errors these are.

    Returns:
        A row for each measure and layer: ``measure``, ``layer`` (missing for the total), ``value``
        and ``stderr`` in ``unit``, ``d_mlp``, and ``reason`` where a measure has no meaning.
        ``attrs`` has ``num_instances`` and ``num_tokens``, which the values are over.
    """
    evaluation = scoring.score_model(
        model,
        input_ids,
        attention_mask,
        measures=measures,
        batch_size=batch_size,
        intervention_instances=intervention_instances,
        noise_seeds=noise_seeds,
    )
    columns = ["measure", "layer", "value", "stderr", "unit", "d_mlp", "reason"]
    frame = pd.DataFrame([asdict(row) for row in evaluation.rows], columns=columns)
    frame = frame.astype({"layer": "Int64", "d_mlp": "Int64"})
    frame.attrs = {
        "num_instances": evaluation.num_instances,
        "num_tokens": evaluation.num_tokens,
    }
    return frame
