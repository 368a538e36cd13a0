"""The forecast of a sweep: trials, tokens, hours. Nothing is fetched, packed or written.

Checkpoints that are not on this machine are not requested: a forecast needs no network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from ke_ray.planning.evaluation_forecast import evaluation_cost
from ke_ray.planning.sweep import end_points, fixed_points, num_drawn, seeds_of, trial_study
from ke_ray.planning.training_forecast import bytes_of_starts, hours_text, num_tokens
from ke_ray.studies.sweep import SweepStudy


@dataclass(frozen=True)
class SweepForecast:
    """Counts of a sweep, made beforehand.

    Attributes:
        num_points, num_trials: trials are points times seeds.
        tokens: of training, over all trials; None where a corpus' size is not given.
        num_starts: different starting checkpoints; None where that takes the network to know.
        bytes_to_fetch: of them, by the size in the model's name; None where nothing tells.
        shown: (trial, its swept keys) of the trials that are known.
    """

    num_points: int
    num_trials: int
    tokens: int | None
    num_starts: int | None
    bytes_to_fetch: int | None
    shown: list[tuple[str, dict[str, Any]]]


def measure_sweep(study: SweepStudy) -> SweepForecast:
    """Count without touching the network.

    Raises:
        ConfigError: a point whose values make no valid study, or too few different points.
    """
    points, drawn = fixed_points(study), num_drawn(study)
    trials = [(point, seed) for point in points for seed in seeds_of(study, point)]
    per_trial = [num_tokens(trial_study(study, *trial)) for trial in trials]
    if drawn:
        for point in end_points(study):
            trial_study(study, point, seeds_of(study, point)[0])
        per_trial += [num_tokens(study.base)] * drawn * len(study.repeats)
    counted = [tokens for tokens in per_trial if tokens is not None]
    total = sum(counted) if len(counted) == len(per_trial) else None
    shown = [(str(point.number), point.params) for point in points]
    starts = _num_starts(study, [params for _, params in shown])
    size = bytes_of_starts(study.base, starts)
    return SweepForecast(len(points) + drawn, len(per_trial), total, starts, size, shown)


def _num_starts(study: SweepStudy, points: list[dict[str, Any]]) -> int | None:
    """Different starting checkpoints of the points, without listing any."""
    starts = study.base.starts
    if points and all("checkpoint" in params for params in points):
        return len({params["checkpoint"] for params in points})
    if study.checkpoint is not None:
        return 1
    return len(set(starts.nearest)) or starts.spread


def forecast(study: SweepStudy) -> str:
    """The plan as text: the resolved study, then the trials and the figures."""
    figures = measure_sweep(study)
    plan = json.loads(study.model_dump_json(exclude_none=True, by_alias=True))
    # None is a value here: it switches a group off.
    plan["points"] = [dict(point) for point in study.points]
    lines = [yaml.safe_dump(plan, sort_keys=False), "points:"]
    for number, params in figures.shown[:60]:
        text = ", ".join(f"{key}={_text(value)}" for key, value in params.items())
        lines.append(f"  {number:>4}  {text}")
    if len(figures.shown) > 60:
        lines.append(f"  … and {len(figures.shown) - 60} more")
    if figures.num_points > len(figures.shown):
        lines.append(
            f"  and {figures.num_points - len(figures.shown)} that {study.search} will draw"
        )
    lines.append(
        f"trials: {figures.num_trials} ({figures.num_points} points"
        + (f", {len(study.repeats)} seeds" if "seed" not in study.swept_keys else "")
        + f"), each with {study.base.num_workers} worker"
        + ("s" if study.base.num_workers > 1 else "")
    )
    if figures.bytes_to_fetch is None:
        lines.append("bytes to fetch: not known")
    else:
        lines.append(
            f"bytes to fetch: about {figures.bytes_to_fetch:,} ({figures.num_starts} checkpoints, "
            "by the name of the model)"
            if figures.bytes_to_fetch
            else "bytes to fetch: 0 (the starts are on this file system)"
        )
    lines.append(hours_text(study.base, study.output, figures.tokens, "trials"))
    if tokens := num_tokens(study.base):
        lines.append(f"{evaluation_cost(study.base, tokens)}, as the base says")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)
