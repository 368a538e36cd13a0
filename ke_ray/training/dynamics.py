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

from ke_ray.core.dynamics import dynamics, dynamics_intervals
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
    about: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row in injections:
        about[row["setting"], int(row["step"])].add(int(row["instance"]))
    for level in ("all", *LEVELS):
        curves = _curves(items, steps, level)
        # Injections of the same paragraphs (paraphrases) share one curve and one bootstrap.
        whole: dict[tuple[tuple[str, int], ...], Any] = {}
        for setting in sorted({key[0] for key in about}):
            for number, step in enumerate(injected):
                wanted = [(setting, i) for i in sorted(about[setting, step])]
                paragraphs = tuple(key for key in wanted if key in curves)
                if not paragraphs:
                    continue
                if paragraphs not in whole:
                    matrix = np.array([curves[key] for key in paragraphs]).T  # [steps, paragraphs]
                    whole[paragraphs] = (
                        dynamics(steps, matrix.mean(axis=1), injected),
                        dynamics_intervals(steps, matrix, injected).effectivity,
                    )
                found, interval = (values[number] for values in whole[paragraphs])
                key = {"setting": setting, "level": level, "injection": number + 1}
                rows.append(
                    {
                        **key,
                        "step": step,
                        "num_paragraphs": len(paragraphs),
                        "baseline_step": found.baseline_step,
                        "lam_step": found.lam_step,
                        "effectivity": _plain(found.effectivity),
                        "effectivity_low": _plain(interval.low),
                        "effectivity_high": _plain(interval.high),
                        "decay": _plain(found.decay),
                    }
                )
                points += [
                    {**key, "lag": int(lag), "retainability": float(share)}
                    for lag, share in zip(found.lags, found.retainability, strict=True)
                ]
    return {"dynamics": rows, "retainability": points}


def _curves(
    items: Sequence[dict[str, Any]], steps: Sequence[int], level: str
) -> dict[tuple[str, int], np.ndarray]:
    """Mean ℓ per target token of each paragraph at each step, [steps]."""
    place = {step: i for i, step in enumerate(steps)}
    sums: dict[tuple[str, int], np.ndarray] = {}
    counts: dict[tuple[str, int], np.ndarray] = {}
    for row in items:
        if level not in ("all", row["level"]):
            continue
        key, i = (row["setting"], int(row["instance"])), place[int(row["step"])]
        sums.setdefault(key, np.zeros(len(steps)))[i] += (
            row["logprob_summed"] / row["num_target_tokens"]
        )
        counts.setdefault(key, np.zeros(len(steps)))[i] += 1
    return {key: total / counts[key] for key, total in sums.items()}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
