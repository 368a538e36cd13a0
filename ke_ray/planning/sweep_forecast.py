"""The forecast of a sweep: trials, tokens, hours. Nothing is fetched, packed or written.

Checkpoints that are not on this machine are not requested: a forecast needs no network.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.errors import KeRayError
from ke_ray.models.architectures import use_description
from ke_ray.models.loading import load_config
from ke_ray.planning.scan_forecast import num_body_parameters
from ke_ray.planning.speed import H100_FLOPS_PER_S, measured_speed
from ke_ray.planning.sweep import end_points, fixed_points, num_drawn, seeds_of, trial_study
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.sweep import SweepStudy

#: Of the matrix products' speed that training as a whole reaches (assumed).
_EFFICIENCY = 0.4
_SIZE_IN_NAME = re.compile(r"(?<![0-9.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])")


@dataclass(frozen=True)
class SweepForecast:
    """Counts of a sweep, made beforehand.

    Attributes:
        num_points, num_trials: trials are points times seeds.
        tokens: of training, over all trials; None where a corpus' size is not given.
        parameters: of the model, for the estimate; None where nothing says.
        parameters_from: where that number comes from.
        shown: (trial, its swept keys) of the trials that are known.
    """

    num_points: int
    num_trials: int
    tokens: int | None
    parameters: float | None
    parameters_from: str
    shown: list[tuple[str, dict[str, Any]]]


def num_tokens(study: ContinualStudy) -> int | None:
    """Training tokens of one run; None where ``corpus.num_instances`` is not given."""
    if study.corpus.num_instances is None:
        return None
    steps = study.epochs * (study.corpus.num_instances // study.global_batch_size)
    return steps * study.global_batch_size * study.sequence_length


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
    parameters, source = _parameters(study)
    shown = [(str(point.number), point.params) for point in points]
    return SweepForecast(len(points) + drawn, len(per_trial), total, parameters, source, shown)


def _parameters(study: SweepStudy) -> tuple[float | None, str]:
    """Weights in matrix products: from a local config, else from the model's name."""
    spec = study.base.starts.spec
    use_description(study.base.architecture)
    if storage.is_local(spec) and storage.exists(spec):
        try:
            config = load_config(list_checkpoints(spec)[-1])
        except KeRayError:
            return None, "no checkpoint could be read"
        head = config.hidden_size * config.vocab_size
        return float(num_body_parameters(config) + head), "the checkpoint's config"
    size = _SIZE_IN_NAME.search(spec)
    if size is None:
        return None, f"'{spec}' is not here and its name gives no size"
    unit = 1e9 if size.group(2) in "bB" else 1e6
    return float(size.group(1)) * unit, f"the name '{spec}'"


def _measured_tokens_per_s(output: str) -> float | None:
    """From trials that this folder has already."""
    folder = storage.join(output, "runs")
    tokens = seconds = 0.0
    for name in storage.list_dir(folder):
        path = storage.join(folder, name, "run.json")
        row = storage.read_json(path).get("row", {}) if storage.exists(path) else {}
        if row.get("status") == "ok" and row.get("duration_s"):
            tokens, seconds = tokens + row["num_tokens"], seconds + row["duration_s"]
    return tokens / seconds if seconds else None


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
    if figures.tokens is None:
        lines.append("training tokens: not known (corpus.num_instances is not given)")
        lines.append("hours: not known")
        return "\n".join(lines)
    lines.append(f"training tokens: about {figures.tokens:,} in all")
    lines.append(_hours(study, figures))
    return "\n".join(lines)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def _hours(study: SweepStudy, figures: SweepForecast) -> str:
    assert figures.tokens is not None
    measured = _measured_tokens_per_s(study.output)
    if measured is not None:
        hours = figures.tokens / measured / 3600
        return (
            f"hours: {_number(hours)} of trials one after another ({measured:,.0f} tokens/s in the "
            "trials that are finished, evaluations included)"
        )
    if figures.parameters is None:
        return f"hours: not known ({figures.parameters_from})"
    speed = measured_speed(study.base.precision, study.base.use_gpu)
    peak = H100_FLOPS_PER_S[study.base.precision]
    hours = 6 * figures.parameters * figures.tokens / _EFFICIENCY / 3600
    return (
        f"hours: {_number(hours / speed.flops_per_s)} on this machine's {speed.device} ({speed}), "
        f"{_number(hours / peak)} on one H100 in {study.base.precision} "
        f"({peak / 1e12:.0f} TFLOP/s, assumed), trials one after another; {_EFFICIENCY:.0%} of "
        f"either assumed, {figures.parameters / 1e6:,.1f}M weights by {figures.parameters_from}; "
        "probes and tasks come on top"
    )


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"
