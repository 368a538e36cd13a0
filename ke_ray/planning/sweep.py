"""What a sweep is going to do: its points and trials, and what is wrong with them, before Ray.

Everything a trial leaves lies in ``<output>/runs/<trial_id>/`` (as in a continual study), its
``run.json`` written last: that file is the ledger. A resumed sweep reads it and needs nothing of
Ray's own state: a trial is finished if its row is there and belongs to the same keys, weights and
seed. Points that were drawn are kept in ``points.json`` before their trials start.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ke_ray import storage
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

if TYPE_CHECKING:
    from ke_ray.checkpoints.reference import CheckpointRef

__all__ = [
    "Point",
    "SweepPlan",
    "Trial",
    "draw_axis",
    "fixed_points",
    "prepare_sweep",
    "value_at",
]

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
        made = [self._trial(point, seed) for seed in self._seeds(point)]
        self.points.append(point)
        self.trials += made
        return made

    def save_points(self) -> None:
        """Write ``points.json``."""
        told = [{"number": point.number, "params": point.params} for point in self.points]
        storage.write_json(storage.join(self.study.output, "points.json"), told)

    def trials_of(self, number: int) -> list[Trial]:
        """The trials of a point."""
        return [trial for trial in self.trials if trial.point.number == number]

    @property
    def num_trials(self) -> int:
        """Trials there will be at the end."""
        to_come = self.num_points - len(self.points)
        return len(self.trials) + to_come * len(self.study.repeats)

    def _seeds(self, point: Point) -> tuple[int, ...]:
        if "seed" not in point.params:
            return self.study.repeats
        seed = point.params["seed"]
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ConfigError(f"the sweep's seed {seed!r} is not a whole number from 0 on.")
        return (seed,)

    def _trial(self, point: Point, seed: int) -> Trial:
        values = resolve(self.study, point.params, seed)
        text = ", ".join(f"{key}={_short(value)}" for key, value in point.params.items())
        study = validate(ContinualStudy, values, f"{self.study.output}, trial with {text}")
        wanted = point.params.get("checkpoint", self.study.checkpoint)
        ref = self._start(study, wanted)
        label = _label(point.params)
        name = storage.slug(f"{point.number:04d}-{label}-seed{seed}"[:80])
        shown = study.model_dump(mode="json")
        params = {key: value_at(shown, key) for key in self.study.shown_keys}
        for key, value in (("checkpoint", ref.name), ("seed", seed)):
            if key in params:
                params[key] = value
        return Trial(point, study, RunSpec(name, ref, seed), params)

    def _start(self, study: ContinualStudy, wanted: Any) -> CheckpointRef:
        key = study.starts.model_dump_json()
        if key not in self._starts:
            self._starts[key] = [spec.ref for spec in list_runs(study)]
        return pick_start(self._starts[key], wanted)


def pick_start(refs: Sequence[CheckpointRef], wanted: Any) -> CheckpointRef:
    """One of the starting checkpoints, in training order.

    Raises:
        ConfigError: there is no such checkpoint, or none was chosen of several.
    """
    names = [ref.name for ref in refs]
    if wanted is None:
        if len(refs) == 1:
            return refs[0]
        raise ConfigError(
            f"the base study has {len(refs)} starting checkpoints ({', '.join(names[:4])}"
            f"{', …' if len(names) > 4 else ''}), a trial has one: choose it with "
            "'checkpoint: last', or sweep the key 'checkpoint'."
        )
    if wanted in names:
        return refs[names.index(wanted)]
    if wanted in ("first", "last"):
        return refs[0 if wanted == "first" else -1]
    steps = [ref for ref in refs if ref.step is not None]
    if isinstance(wanted, int) and not isinstance(wanted, bool) and steps:
        return min(steps, key=lambda ref: abs((ref.step or 0) - wanted))
    raise ConfigError(
        f"checkpoint {wanted!r} is none of the base study's starts.{nearest(str(wanted), names)} "
        f"There are {', '.join(names[:6])}{', …' if len(names) > 6 else ''}; also a step, 'first' "
        "or 'last'."
    )


def resolve(study: SweepStudy, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The keys of the continual study that a trial runs."""
    base = study.base.model_dump(mode="json", exclude_unset=True)
    values = set_keys(base, {k: v for k, v in params.items() if k not in ("checkpoint", "seed")})
    values |= {
        "output": study.output,
        "seeds": [seed],
        "executor": "ray",
        "mlflow": study.mlflow.model_dump(mode="json"),
    }
    return values


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where a group on the way is absent."""
    place: Any = values
    for part in key.split("."):
        if not isinstance(place, Mapping):
            return None
        place = place.get(part)
    return place


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
        ConfigError: the space has fewer points than are asked for.
    """
    found = [dict(point) for point in study.points]
    if study.search == "grid":
        found += study.grid_points()
    elif study.search == "random" and study.space:
        found += _random(study)
    seen: set[str] = set()
    unique = []
    for params in found:
        text = json.dumps(params, sort_keys=True)
        if text not in seen:
            seen.add(text)
            unique.append(params)
    return [Point(number, params) for number, params in enumerate(unique)]


def _random(study: SweepStudy) -> list[dict[str, Any]]:
    generator = np.random.Generator(np.random.PCG64([study.search_seed, 1]))
    wanted, found = study.num_trials or 0, dict[str, dict[str, Any]]()
    for _ in range(wanted * _MAX_DRAWS):
        params = {key: draw_axis(axis, generator) for key, axis in study.space.items()}
        found.setdefault(json.dumps(params, sort_keys=True), params)
        if len(found) == wanted:
            return list(found.values())
    raise ConfigError(
        f"the space has only {len(found)} different points, num_trials asks for {wanted}; ask for "
        "fewer, or use search: grid."
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
    known = _known_points(study)
    fixed = fixed_points(study)
    for point in known if len(known) > len(fixed) else fixed:
        plan.add(point)
    drawn = study.num_trials or 0 if study.search == "tpe" and study.space else 0
    plan.num_points = len(fixed) + drawn
    if drawn:
        _check_ends(plan)
    plan.files = fingerprints(plan.trials)
    if known:
        check_unchanged(study.output, read_manifest(study.output).get("files", {}), plan.files)
    pending = [trial for trial in plan.trials if not trial.is_done]
    check_inputs(pending)
    return plan


def _known_points(study: SweepStudy) -> list[Point]:
    """Points of an earlier command into this folder."""
    if not storage.exists(storage.join(study.output, "manifest.json")):
        return []
    manifest = read_manifest(study.output, "sweep")
    check_same_study(study.output, manifest, identity_keys(study))
    path = storage.join(study.output, "points.json")
    if not storage.exists(path):
        return []
    return [Point(entry["number"], entry["params"]) for entry in storage.read_json(path)]


def _check_ends(plan: SweepPlan) -> None:
    """Try samples of every axis, so that a draw cannot turn out to be invalid later."""
    space = plan.study.space
    usual = {key: axis.samples()[0] for key, axis in space.items()}
    probe = SweepPlan(plan.study, _starts=plan._starts)
    for key, value in itertools.chain.from_iterable(
        ((key, end) for end in axis.samples()) for key, axis in space.items()
    ):
        probe.add(Point(0, {**usual, key: value}))
    check_inputs(probe.trials[:1])
