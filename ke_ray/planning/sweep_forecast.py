"""What a sweep would do: trials, tokens, hours. Nothing is fetched, packed or written.

Checkpoints that are not on this machine are not asked for: a plan can be printed without a network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ke_ray import storage
from ke_ray.config import validate
from ke_ray.errors import KeRayError
from ke_ray.planning.scan_forecast import num_body_parameters
from ke_ray.planning.speed import H100_FLOPS_PER_S, measured_speed
from ke_ray.planning.sweep import fixed_points, resolve
from ke_ray.planning.trials import Point
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.sweep import SweepStudy

__all__ = ["SweepForecast", "forecast", "measure_sweep", "num_tokens"]

#: Of the matrix products' speed that training reaches, all told (assumed).
_EFFICIENCY = 0.4
_SIZE_IN_NAME = re.compile(r"(?<![0-9.])(\d+(?:\.\d+)?)([bBmM])(?![a-zA-Z])")


@dataclass(frozen=True)
class SweepForecast:
    """What is known of a sweep beforehand.

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
    points = fixed_points(study)
    drawn = (study.num_trials or 0) if study.search == "tpe" and study.space else 0
    seeds = [len(_seeds(study, point)) for point in points]
    trials = [(point, _validated(study, point)) for point in points]
    per_trial = [num_tokens(trial) for _, trial in trials]
    if drawn:
        ends = {key: axis.samples()[0] for key, axis in study.space.items()}
        for key, axis in study.space.items():
            for end in axis.samples():
                _validated(study, Point(0, {**ends, key: end}))
        typical = num_tokens(study.base)
        per_trial += [typical] * drawn
        seeds += [len(study.repeats)] * drawn
    known = [tokens for tokens in per_trial if tokens is not None]
    total = None
    if len(known) == len(per_trial):
        total = sum(t * n for t, n in zip(known, seeds, strict=True))
    parameters, where = _parameters(study)
    shown = [(str(point.number), point.params) for point in points]
    return SweepForecast(len(points) + drawn, sum(seeds), total, parameters, where, shown)


def _seeds(study: SweepStudy, point: Point) -> Sequence[int]:
    return (point.params["seed"],) if "seed" in point.params else study.repeats


def _validated(study: SweepStudy, point: Point) -> ContinualStudy:
    values = resolve(study, point.params, _seeds(study, point)[0])
    return validate(ContinualStudy, values, f"point {point.number} of {study.output}")


def _parameters(study: SweepStudy) -> tuple[float | None, str]:
    """Weights in matrix products: from a local config, else from the model's name."""
    spec = study.base.starts.spec
    if storage.is_local(spec) and storage.exists(spec):
        from ke_ray.checkpoints.find.catalog import list_checkpoints
        from ke_ray.models.loading import load_config

        try:
            config = load_config(list_checkpoints(spec)[-1])
        except KeRayError:
            return None, "no checkpoint could be read"
        head = config.hidden_size * config.vocab_size
        return float(num_body_parameters(config) + head), "the checkpoint's config"
    found = _SIZE_IN_NAME.search(spec)
    if found is None:
        return None, f"'{spec}' is not here and its name gives no size"
    unit = 1e9 if found.group(2) in "bB" else 1e6
    return float(found.group(1)) * unit, f"the name '{spec}'"


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
    found = measure_sweep(study)
    plan = json.loads(study.model_dump_json(exclude_none=True, by_alias=True))
    # None is a value here: it switches a group off.
    plan["points"] = [dict(point) for point in study.points]
    lines = [yaml.safe_dump(plan, sort_keys=False), "points:"]
    for number, params in found.shown[:60]:
        text = ", ".join(f"{key}={_text(value)}" for key, value in params.items())
        lines.append(f"  {number:>4}  {text}")
    if len(found.shown) > 60:
        lines.append(f"  … and {len(found.shown) - 60} more")
    if found.num_points > len(found.shown):
        lines.append(f"  and {found.num_points - len(found.shown)} that {study.search} will draw")
    lines.append(
        f"trials: {found.num_trials} ({found.num_points} points"
        + (f", {len(study.repeats)} seeds" if "seed" not in study.swept_keys else "")
        + f"), each with {study.base.num_workers} worker"
        + ("s" if study.base.num_workers > 1 else "")
    )
    if found.tokens is None:
        lines.append("training tokens: not known (corpus.num_instances is not given)")
        lines.append("hours: not known")
        return "\n".join(lines)
    lines.append(f"training tokens: about {found.tokens:,} in all")
    lines.append(_hours(study, found))
    return "\n".join(lines)


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def _hours(study: SweepStudy, found: SweepForecast) -> str:
    assert found.tokens is not None
    measured = _measured_tokens_per_s(study.output)
    if measured is not None:
        hours = found.tokens / measured / 3600
        return (
            f"hours: {_number(hours)} of trials one after another ({measured:,.0f} tokens/s in the "
            "trials that are finished, evaluations included)"
        )
    if found.parameters is None:
        return f"hours: not known ({found.parameters_from})"
    speed = measured_speed(study.base.precision, study.base.use_gpu)
    peak = H100_FLOPS_PER_S[study.base.precision]
    hours = 6 * found.parameters * found.tokens / _EFFICIENCY / 3600
    return (
        f"hours: {_number(hours / speed.flops_per_s)} on this machine's {speed.device} ({speed}), "
        f"{_number(hours / peak)} on one H100 in {study.base.precision} "
        f"({peak / 1e12:.0f} TFLOP/s, assumed), trials one after another; {_EFFICIENCY:.0%} of "
        f"either assumed, {found.parameters / 1e6:,.1f}M weights by {found.parameters_from}; "
        "probes and tasks come on top"
    )


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"
