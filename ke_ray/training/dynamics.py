"""Effectivity, retainability and decay of a run's injections, from its probe items.

For *paraphrase* facts every injection is about all of them; for *once* facts injection i is about
its own group, so each group has its own curve. Per level, and over all levels together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ke_ray.core.dynamics import dynamics, effectivity_intervals
from ke_ray.data.facts import LEVELS


def dynamics_tables(
    items: Sequence[dict[str, Any]], injections: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables ``dynamics`` and ``retainability``, without the run.

    Args:
        items: rows of ``probe_items``.
        injections: rows of ``injections``.
    """
    steps = sorted({int(row["step"]) for row in items})
    injected = sorted({int(row["step"]) for row in injections})
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    if not steps or not injected:
        return {"dynamics": rows, "retainability": points}
    facts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row in injections:
        facts[row["setting"], int(row["step"])].add(int(row["instance"]))
    for level in ("all", *LEVELS):
        curves = _curves(items, steps, level)
        # Injections of the same paragraphs (paraphrases) share one curve.
        whole: dict[tuple[tuple[str, int], ...], Any] = {}
        for setting in sorted({key[0] for key in facts}):
            for number, step in enumerate(injected):
                pairs = [(setting, i) for i in sorted(facts[setting, step])]
                paragraphs = tuple(key for key in pairs if key in curves)
                if not paragraphs:
                    continue
                if paragraphs not in whole:
                    matrix = np.array([curves[key] for key in paragraphs]).T  # [steps, paragraphs]
                    entries = dynamics(steps, matrix.mean(axis=1), injected)
                    intervals = effectivity_intervals(steps, matrix, entries)
                    whole[paragraphs] = entries, intervals
                curve, interval = (values[number] for values in whole[paragraphs])
                key = {"setting": setting, "level": level, "injection": number + 1}
                rows.append(
                    {
                        **key,
                        "step": step,
                        "num_paragraphs": len(paragraphs),
                        "baseline_step": curve.baseline_step,
                        "lam_step": curve.lam_step,
                        "effectivity": _plain(curve.effectivity),
                        "effectivity_low": _plain(interval.low),
                        "effectivity_high": _plain(interval.high),
                        "decay": _plain(curve.decay),
                    }
                )
                points += [
                    {**key, "lag": int(lag), "retainability": float(share)}
                    for lag, share in zip(curve.lags, curve.retainability, strict=True)
                ]
    return {"dynamics": rows, "retainability": points}


def _curves(
    items: Sequence[dict[str, Any]], steps: Sequence[int], level: str
) -> dict[tuple[str, int], np.ndarray]:
    """Mean ℓ per target token of each paragraph at each step, [steps]."""
    index = {step: i for i, step in enumerate(steps)}
    sums: dict[tuple[str, int], np.ndarray] = {}
    counts: dict[tuple[str, int], np.ndarray] = {}
    for row in items:
        if level not in ("all", row["level"]):
            continue
        key, i = (row["setting"], int(row["instance"])), index[int(row["step"])]
        sums.setdefault(key, np.zeros(len(steps)))[i] += (
            row["logprob_summed"] / row["num_target_tokens"]
        )
        counts.setdefault(key, np.zeros(len(steps)))[i] += 1
    return {key: total / counts[key] for key, total in sums.items()}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
