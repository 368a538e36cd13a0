"""The plan of a sweep: its points and trials, checked before Ray starts.

Everything a trial leaves lies in ``<output>/runs/<trial_id>/`` (as in a continual study), its
``run.json`` written last: that file is the ledger. A resumed sweep reads it and needs nothing of
Ray's own state: a trial is finished if its row is there and belongs to the same settings, weights
and seed. Points that were drawn are kept in ``points.json`` before their trials start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ke_ray import storage
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.config import set_keys, validate
from ke_ray.errors import ConfigError, nearest
from ke_ray.planning.sweep_inputs import check_inputs, check_unchanged, fingerprints
from ke_ray.planning.trials import Point, Trial
from ke_ray.results.manifest import read_manifest
from ke_ray.storage.ownership import claimed
from ke_ray.studies.axis import Axis
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.identity import check_same_study, identity_keys
from ke_ray.studies.sweep import SweepStudy
from ke_ray.training.runs import RunSpec, list_runs

_MAX_DRAWS = 200


@dataclass
class SweepPlan:
    """A sweep that is ready to run.

    Attributes:
        points: fixed ones and those drawn so far, in order of their numbers.
        trials: of all points, by point and seed.
        num_points: points there will be at the end.
        files: local files that the trials read, and their fingerprints.
    """

    study: SweepStudy
    points: list[Point] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    num_points: int = 0
    files: dict[str, str] = field(default_factory=dict)
    _starts: dict[str, list[CheckpointRef]] = field(default_factory=dict)

    def add(self, point: Point) -> list[Trial]:
        """Take a point in, with its trials.

        Raises:
            ConfigError: the point's values make no valid study, or name no checkpoint.
        """
        trials = [self._trial(point, seed) for seed in seeds_of(self.study, point)]
        self.points.append(point)
        self.trials += trials
        return trials

    def save_points(self) -> None:
        """Write ``points.json``."""
        points = [{"number": point.number, "params": point.params} for point in self.points]
        storage.write_json(storage.join(self.study.output, "points.json"), points)

    def trials_of(self, number: int) -> list[Trial]:
        """The trials of a point."""
        return [trial for trial in self.trials if trial.point.number == number]

    @property
    def num_trials(self) -> int:
        """Trials there will be at the end."""
        to_come = self.num_points - len(self.points)
        return len(self.trials) + to_come * len(self.study.repeats)

    def _trial(self, point: Point, seed: int) -> Trial:
        study = trial_study(self.study, point, seed)
        ref = self._start(study, point.params.get("checkpoint", self.study.checkpoint))
        name = storage.slug(f"{point.number:04d}-{_label(point.params)}-seed{seed}"[:80])
        shown = study.model_dump(mode="json")
        params = {key: value_at(shown, key) for key in self.study.shown_keys}
        for key, value in (("checkpoint", ref.name), ("seed", seed)):
            if key in params:
                params[key] = value
        return Trial(point, study, RunSpec(name, ref, seed), params)

    def _start(self, study: ContinualStudy, checkpoint: Any) -> CheckpointRef:
        key = study.starts.model_dump_json()
        if key not in self._starts:
            self._starts[key] = [spec.ref for spec in list_runs(study)]
        return pick_start(self._starts[key], checkpoint)


def pick_start(refs: Sequence[CheckpointRef], checkpoint: Any) -> CheckpointRef:
    """One of the starting checkpoints, in training order.

    Raises:
        ConfigError: there is no such checkpoint, or none was chosen of several.
    """
    names = [ref.name for ref in refs]
    if checkpoint is None:
        if len(refs) == 1:
            return refs[0]
        raise ConfigError(
            f"The base study has {len(refs)} starting checkpoints ({', '.join(names[:4])}"
            f"{', …' if len(names) > 4 else ''}), and a trial has one: choose it with "
            "'checkpoint: last', or sweep the key 'checkpoint'."
        )
    if checkpoint in names:
        return refs[names.index(checkpoint)]
    if checkpoint in ("first", "last"):
        return refs[0 if checkpoint == "first" else -1]
    with_step = [ref for ref in refs if ref.step is not None]
    if isinstance(checkpoint, int) and not isinstance(checkpoint, bool) and with_step:
        return min(with_step, key=lambda ref: abs((ref.step or 0) - checkpoint))
    raise ConfigError(
        f"The checkpoint {checkpoint!r} is none of the base study's starts."
        f"{nearest(str(checkpoint), names)} They are {', '.join(names[:6])}"
        f"{', …' if len(names) > 6 else ''}; a step, 'first' and 'last' are understood too."
    )


def seeds_of(study: SweepStudy, point: Point) -> tuple[int, ...]:
    """The seeds of a point's trials.

    Raises:
        ConfigError: the point's own seed is not a whole number from 0 on.
    """
    if "seed" not in point.params:
        return study.repeats
    seed = point.params["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"The sweep's seed is {seed!r}; it must be a whole number from 0 on.")
    return (seed,)


def trial_study(study: SweepStudy, point: Point, seed: int) -> ContinualStudy:
    """The continual study that a trial runs.

    Raises:
        ConfigError: the point's values make no valid study.
    """
    base = study.base.model_dump(mode="json", exclude_unset=True)
    params = {k: v for k, v in point.params.items() if k not in ("checkpoint", "seed")}
    values = set_keys(base, params) | {
        "output": study.output,
        "seeds": [seed],
        "executor": "ray",
        "mlflow": study.mlflow.model_dump(mode="json"),
    }
    text = ", ".join(f"{key}={_short(value)}" for key, value in point.params.items())
    return validate(ContinualStudy, values, f"{study.output}, trial with {text}")


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where a group on the way is absent."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}".replace("e+", "e")  # file names have no plus
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)


def _label(params: Mapping[str, Any]) -> str:
    """``factor2-ratio0.5``; a group that is switched off is ``no-resuscitation``."""
    parts = []
    for key, value in params.items():
        last = key.rsplit(".", 1)[-1]
        if key == "seed":
            continue
        if isinstance(value, Mapping):
            parts.append("-".join(f"{k}{_short(v)}" for k, v in value.items()))
        elif value is None:
            parts.append(f"no-{last}")
        elif isinstance(value, str):
            parts.append(value.rsplit("/", 1)[-1])
        else:
            parts.append(f"{last}{_short(value)}")
    return "-".join(parts)


def fixed_points(study: SweepStudy) -> list[Point]:
    """The points that are known without results: those given, a grid, or random draws.

    Raises:
        ConfigError: the space has fewer points than ``num_trials``.
    """
    points = [dict(point) for point in study.points]
    if study.search == "grid":
        points += study.grid_points()
    elif study.search == "random" and study.space:
        points += _random(study)
    unique: dict[str, dict[str, Any]] = {}
    for params in points:
        unique.setdefault(json.dumps(params, sort_keys=True), params)
    return [Point(number, params) for number, params in enumerate(unique.values())]


def num_drawn(study: SweepStudy) -> int:
    """Points that Optuna draws while the sweep runs."""
    return (study.num_trials or 0) if study.search == "tpe" and study.space else 0


def end_points(study: SweepStudy) -> Iterator[Point]:
    """Samples of every axis, to find out beforehand whether a draw could be invalid."""
    usual = {key: axis.samples()[0] for key, axis in study.space.items()}
    for key, axis in study.space.items():
        yield from (Point(0, {**usual, key: value}) for value in axis.samples())


def _random(study: SweepStudy) -> list[dict[str, Any]]:
    generator = np.random.Generator(np.random.PCG64([study.search_seed, 1]))
    num_trials, points = study.num_trials or 0, dict[str, dict[str, Any]]()
    for _ in range(num_trials * _MAX_DRAWS):
        params = {key: draw_axis(axis, generator) for key, axis in study.space.items()}
        points.setdefault(json.dumps(params, sort_keys=True), params)
        if len(points) == num_trials:
            return list(points.values())
    raise ConfigError(
        f"num_trials is {num_trials}, but the space has only {len(points)} different points; lower "
        "num_trials, or use search: grid."
    )


def draw_axis(axis: Axis, generator: np.random.Generator) -> Any:
    """One value, uniform over the axis (over its logarithm for ``loguniform``)."""
    if axis.choice is not None:
        return axis.choice[int(generator.integers(len(axis.choice)))]
    if axis.integer is not None:
        return int(generator.integers(axis.integer[0], axis.integer[1] + 1))
    if axis.uniform is not None:
        return float(generator.uniform(*axis.uniform))
    assert axis.loguniform is not None
    return float(np.exp(generator.uniform(*np.log(axis.loguniform))))


def prepare_sweep(study: SweepStudy) -> SweepPlan:
    """Lay out the trials and find out what is wrong before anything runs.

    Packed corpora may be left in the output folder, which is claimed (``storage.ownership``); a
    command holds that claim until it has run the sweep.

    Raises:
        UserError: a value that makes no valid study, a checkpoint or a corpus that is not there,
            a folder that holds another sweep, …
    """
    with claimed(study.output, "sweep"):
        return _prepare_claimed(study)


def _prepare_claimed(study: SweepStudy) -> SweepPlan:
    plan = SweepPlan(study)
    earlier = _earlier_points(study)
    fixed = fixed_points(study)
    for point in earlier if len(earlier) > len(fixed) else fixed:
        plan.add(point)
    plan.num_points = len(fixed) + num_drawn(study)
    if num_drawn(study):
        probe = SweepPlan(study, _starts=plan._starts)
        for point in end_points(study):
            probe.add(point)
        check_inputs(probe.trials[:1])
    plan.files = fingerprints(plan.trials)
    if earlier:
        check_unchanged(study.output, read_manifest(study.output).get("files", {}), plan.files)
    check_inputs([trial for trial in plan.trials if not trial.is_done])
    return plan


def _earlier_points(study: SweepStudy) -> list[Point]:
    """Points of an earlier command into this folder."""
    if not storage.exists(storage.join(study.output, "manifest.json")):
        return []
    manifest = read_manifest(study.output, "sweep")
    check_same_study(study.output, manifest, identity_keys(study))
    path = storage.join(study.output, "points.json")
    if not storage.exists(path):
        return []
    return [Point(entry["number"], entry["params"]) for entry in storage.read_json(path)]
