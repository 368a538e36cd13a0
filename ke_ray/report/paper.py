"""Published results to lay over a study, where the study repeats the published one.

Kim et al. (arXiv 2410.01380 v3), Table 1: OLMo-1B continued on PubMed, 204,800 sequences of
1,024 tokens, acquisition A and forgetting F in per cent by starting step and setting; Table 2: K
and P behind them. The paper's K and A come from summed log probabilities divided by the padded
length of a batch, ours from log probabilities per target token: trends compare, values of A only
roughly, and values of K not at all.

Facts: numbers of these tables and of §4, quoted (licence: none asked for; the text and the figures
of the paper, which are its authors', are not here).

Of Table 2 the rows of the baseline are known here. K and P before training follow from them, A and
F (``before``), and those of the other settings from the same starts (``after``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ke_ray.report.sources import Result

STEPS = (118_000, 369_000, 554_000, 738_000)
TREND_ONLY = (
    "The paper's A rests on log probabilities divided by the padded length of a batch, ours on "
    "log probabilities per target token: compare the trend over the stages, not the values."
)
# Objective -> what the paper prints about its correlation with knowledge entropy (§4). The text
# does not tell the number of points; its p-values are those of these r at n = 10, while Table 1
# has four stages.
CORRELATIONS = {"acquisition": 0.94, "forgetting": -0.96}
_TOKENS = 204_800 * 1024
_STAGE_TOLERANCE = 2_000


@dataclass(frozen=True)
class Row:
    """A row of Table 1: the recipe, and A and F in % at ``STEPS``."""

    global_batch_size: int
    learning_rate: float
    epochs: int
    acquisition: tuple[float, ...]
    forgetting: tuple[float, ...]


TABLE_1: dict[str, Row] = {
    "baseline": Row(128, 4e-4, 1, (25.2, 24.8, 21.4, 18.8), (10.5, 12.9, 17.0, 19.5)),
    "batch 2048": Row(2048, 4e-4, 1, (8.9, 7.8, 1.0, -92.2), (2.2, 3.5, 5.5, 44.9)),
    "lr 1e-3": Row(128, 1e-3, 1, (17.3, 15.7, 10.7, 5.0), (16.7, 20.3, 23.0, 23.5)),
    "lr 1e-4": Row(128, 1e-4, 1, (21.6, 23.0, 23.7, 22.6), (2.4, 3.2, 4.6, 7.3)),
    "3 epochs": Row(128, 4e-4, 3, (28.8, 28.0, 25.9, 24.5), (14.8, 17.4, 20.1, 23.1)),
}


# The baseline after training, as printed: K in the published code's units, P in %.
_BASELINE_AFTER = {
    "probe_logprob_after": (-0.281, -0.280, -0.293, -0.301),
    "downstream_after": (54.0, 54.6, 52.8, 52.0),
}
# A column of K or P after training -> the column of A or F that leads back to K or P before it.
_CHANGE = {"probe_logprob_after": "acquisition", "downstream_after": "forgetting"}


# (model, measure) -> the ends of the axis of the paper's figure in nats; read off its ticks, those
# of attention and next-token entropy (Fig. 3, A.4) only roughly.
_AXES = {
    ("olmo-1b", "knowledge_entropy"): (143.6, 144.0),
    ("olmo-7b", "knowledge_entropy"): (297.0, 297.6),
    ("olmo-1b", "knowledge_entropy of a layer"): (8.88, 9.00),
    ("olmo-1b", "attention_entropy"): (40, 70),
    ("olmo-1b", "next_token_entropy"): (2.4, 2.8),
}


def axis_of_figure(scan: Result, measure: str) -> tuple[float, float] | None:
    """What the axis of the paper's figure of a measure spans; None for models not the paper's."""
    config = scan.manifest.get("config")
    checkpoints = config.get("checkpoints") if isinstance(config, Mapping) else None
    spec = str(checkpoints.get("spec")) if isinstance(checkpoints, Mapping) else ""
    name = spec.rsplit("/", 1)[-1].lower().removesuffix("-hf")
    return _AXES.get((name, measure))


def before(column: str) -> tuple[float, ...]:
    """K or P (its column after training) of the untrained starts at ``STEPS``, as implied.

    A = (K_CL − K_PT) / |K_PT| with K < 0, and F = −(P_CL − P_PT) / P_PT: both give the start as the
    value after training divided by 1 − A, or by 1 − F.
    """
    changes = getattr(TABLE_1["baseline"], _CHANGE[column])
    values = _BASELINE_AFTER[column]
    return tuple(value / (1 - change / 100) for value, change in zip(values, changes, strict=True))


def after(setting: str, column: str) -> tuple[float, ...]:
    """K or P after training at ``STEPS``: the baseline's as printed, the others' as implied."""
    if setting == "baseline":
        return _BASELINE_AFTER[column]
    changes = getattr(TABLE_1[setting], _CHANGE[column])
    return tuple(
        value * (1 - change / 100) for value, change in zip(before(column), changes, strict=True)
    )


def published(setting: str, column: str) -> tuple[float, ...]:
    """A, F (in %), K or P (in %) after training of a setting at ``STEPS``, by column of runs."""
    if column in _CHANGE:
        return after(setting, column)
    values: tuple[float, ...] = getattr(TABLE_1[setting], column)
    return values


def is_olmo_1b(spec: str) -> bool:
    """Whether a SPEC names the model of the tables."""
    return "olmo-1b" in spec.lower().replace("_", "-")


def nearest_stage(step: float) -> int | None:
    """The index in ``STEPS`` of the stage at which a run starts; None where it is none of them."""
    gaps = np.abs(np.subtract(STEPS, step))
    index = int(np.argmin(gaps))
    return index if gaps[index] < _STAGE_TOLERANCE else None


def repeated(result: Result, frame: pd.DataFrame) -> tuple[pd.Series, str]:
    """(the published setting that each run repeats, NaN where none; why the first of those not).

    A run repeats a row of Table 1 when it starts unchanged from OLMo-1B at a published stage,
    trains on PubMed and has the row's batch size, learning rate, epochs and number of tokens.
    """
    settings, reasons = [], []
    for row in frame.to_dict("records"):
        reason = next(_differences(result, row), "")
        settings.append(None if reason else _setting(result, row))
        reasons += [reason] if reason else []
    return pd.Series(settings, index=frame.index, dtype=object), next(iter(reasons), "")


def _differences(result: Result, row: Mapping[str, Any]) -> Iterator[str]:
    if not is_olmo_1b(str(_value(result, row, "starts.spec"))):
        yield "the study does not start from OLMo-1B"
    if row["variant"] != "original":
        yield "the starts are resuscitated"
    if nearest_stage(row["step"]) is None:
        yield "no start is one of the published stages (118k, 369k, 554k, 738k)"
    corpus = [row["corpus"], *(_value(result, row, f"corpus.{key}") for key in ("name", "source"))]
    if not any("pubmed" in str(name).lower() for name in corpus):
        yield "the corpus is not PubMed"
    setting = _setting(result, row)
    if setting is None:
        batch, rate, epochs = _recipe(result, row)
        yield f"it has no row with batch {batch}, learning rate {rate} and {epochs} epochs"
    elif not abs(row.get("num_tokens", 0) / (_TOKENS * TABLE_1[setting].epochs) - 1) < 0.02:
        yield "the runs do not see 204,800 sequences of 1,024 tokens an epoch"


def _setting(result: Result, row: Mapping[str, Any]) -> str | None:
    recipe = _recipe(result, row)
    for name, published in TABLE_1.items():
        if recipe == (published.global_batch_size, published.learning_rate, published.epochs):
            return name
    return None


def _recipe(result: Result, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    names = ("global_batch_size", "optimizer.learning_rate", "epochs")
    batch, rate, epochs = (_value(result, row, name) for name in names)
    return batch, rate, epochs


def _value(result: Result, row: Mapping[str, Any], key: str) -> Any:
    """A key of a run's study: the trial's own value where it was swept, else the base study's."""
    own = row.get(key)
    if own is not None and own == own:  # NaN is no value
        return own
    config: Any = result.manifest.get("config", {})
    config = config.get("base", config) if result.kind == "sweep" else config
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
