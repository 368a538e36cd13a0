"""Sweep studies: variations of one continual study.

A *point* is one choice of the swept keys, a *trial* a point with one seed. Points come from the
list ``points`` (each replaces the named keys of the base study and is tried first) and from the
search over ``space``. Seeds repeat every point; repeats are aggregated, never searched over.

Keys are the dotted keys of the continual study (``resuscitation.factor``,
``optimizer.learning_rate``, ``corpus.source``, …) and two more: ``checkpoint``, which of the base's
starting checkpoints (name, pretraining step, ``first`` or ``last``), and ``seed``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, field_validator, model_validator

from ke_ray import storage
from ke_ray.config import Key, Strict, parse_overrides, read_yaml, set_keys, validate
from ke_ray.core.measures import declaration
from ke_ray.errors import ConfigError, nearest
from ke_ray.results.column import Direction
from ke_ray.results.columns import OBJECTIVES
from ke_ray.studies.axis import Axis, check_optuna
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.identity import affects_result
from ke_ray.studies.parts import TrackingSettings

_OWN_KEYS = ("checkpoint", "seed")
#: A trial has one seed, and is a continual study whatever a sweep changes.
_NOT_SWEPT = ("kind", "seeds")


class Objective(Strict):
    """A metric to compare trials by; a plain text is the metric with its usual direction."""

    metric: str
    direction: Direction

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        given = {"metric": value} if isinstance(value, str) else value
        if isinstance(given, Mapping) and given.get("metric") in OBJECTIVES:
            return {"direction": OBJECTIVES[given["metric"]].direction, **given}
        if isinstance(given, Mapping) and "metric" in given:
            name = str(given["metric"])
            if (measure := declaration(name)) is None:
                raise ValueError(
                    f"unknown objective '{name}'.{nearest(name, OBJECTIVES)} Objectives: "
                    f"{', '.join(OBJECTIVES)}, and measures that base.entropy.measures names"
                )
            if measure.direction is None and given.get("direction") is None:
                raise ValueError(
                    f"objective '{name}' is a measure that is neither better high nor low; say "
                    f"which is wanted: {{metric: {name}, direction: maximize}} or minimize"
                )
            return {"direction": measure.direction, **given}
        return given


class Asha(Strict):
    """Asynchronous successive halving on the acquisition that probes show while training.

    A trial's time is the share of its steps, so that trials of different lengths compare.
    """

    name: Literal["asha"] = "asha"
    grace: float = Field(0.25, gt=0, lt=1, description="share of steps before a trial may stop")
    reduction_factor: float = Field(2, gt=1, description="one of this many continues per rung")


class SweepStudy(Strict):
    """``ke-ray sweep``."""

    kind: Literal["sweep"] = "sweep"
    name: str | None = Key(
        None, affects_result=False, description="MLflow run name; default: the output folder's name"
    )
    output: str = Key(affects_result=False, description="folder or URI for the results")
    base: ContinualStudy = Field(description="the continual study: inline, or the path of its file")
    checkpoint: str | int | None = Field(
        None,
        description="start of the base: name, nearest step, first or last; null: the only one",
    )
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="repeats of every point; null: the base's"
    )
    space: dict[str, Axis] = Field(default_factory=dict, description="swept key → its values")
    points: tuple[dict[str, Any], ...] = Field(
        (), description="points (key → value) to try before those of the search"
    )
    search: Literal["grid", "random", "tpe"] = "grid"
    num_trials: int | None = Field(None, ge=1, description="points to draw, for random and tpe")
    search_seed: int = Field(0, ge=0, description="seed of random and tpe")
    startup_trials: int = Field(10, ge=1, description="random points before tpe starts")
    objectives: tuple[Objective, ...] = Field(
        (Objective(metric="acquisition", direction="maximize"),), min_length=1
    )
    scheduler: Asha | None = None
    max_concurrent: int | None = Key(
        None, affects_result=False, ge=1, description="trials at once; null: what the cluster holds"
    )
    cpus_per_trial: int | None = Key(
        None, affects_result=False, ge=1, description="null: an even share of all CPUs"
    )
    gpus_per_trial: float | None = Key(
        None, affects_result=False, ge=0, description="null: one where there are any"
    )
    retries: int = Key(1, affects_result=False, ge=0, description="of a trial that fails")
    mlflow: TrackingSettings = Key(TrackingSettings(), affects_result=False)

    @field_validator("space", "points")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        swept, every = sweep_keys(), sweep_keys(without_effect=True)
        for keys in [value] if isinstance(value, Mapping) else value:
            for key in keys:
                if key in swept:
                    continue
                if key in every:
                    raise ValueError(
                        f"'{key}' cannot be swept: it does not change a trial's result"
                    )
                hint = " Did you mean 'seed'?" if key == "seeds" else nearest(key, swept)
                raise ValueError(
                    f"unknown sweep key '{key}'.{hint} Keys are those of a continual study "
                    f"(for example resuscitation.factor), {' and '.join(_OWN_KEYS)}"
                )
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and (len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise ValueError(f"seeds {list(seeds)} must be different and not negative")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> SweepStudy:
        if not self.space and not self.points:
            raise ValueError("there is nothing to try; give space, points or both")
        if self.search == "grid" and self.num_trials is not None:
            raise ValueError("num_trials goes with search random or tpe; a grid has all its points")
        if self.search != "grid" and self.space and self.num_trials is None:
            raise ValueError(f"search {self.search} needs num_trials")
        if self.search == "grid":
            for key, axis in self.space.items():
                try:
                    axis.grid()
                except ValueError as error:
                    raise ValueError(f"space.{key}: {error}") from error
        if self.search == "tpe":
            check_optuna(self.space, self.num_trials)
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objectives {', '.join(metrics)}: one is named twice")
        for metric in metrics:
            if metric not in OBJECTIVES:
                self._check_measured(metric)
                continue
            group = str(OBJECTIVES[metric].needs)
            if not self._has(group):
                raise ValueError(
                    f"no trial would report the objective '{metric}': the base study has no "
                    f"'{group}' group; add it, or choose another objective"
                )
        if "seed" in self.swept_keys and self.seeds is not None:
            raise ValueError("sweep the key 'seed' or give seeds as repeats, not both")
        if self.scheduler is not None:
            self._check_scheduler()
        return self

    def _check_measured(self, metric: str) -> None:
        named = self.base.entropy.measures if self.base.entropy else ()
        if metric not in named and not {"entropy", "entropy.measures"} & set(self.swept_keys):
            raise ValueError(
                f"no trial would measure the objective '{metric}'; name it in "
                f"base.entropy.measures ({', '.join(named) or 'which names none'}), or choose "
                "another objective"
            )

    def _has(self, group: str) -> bool:
        if getattr(self.base, group) is not None:
            return True
        swept = {key.split(".", 1)[0] for key in self.swept_keys}
        return group in swept

    def _check_scheduler(self) -> None:
        if self.base.injection is None:
            raise ValueError("asha compares what probes show while training; injection is missing")
        if self.base.num_workers > 1:
            raise ValueError(
                f"base.num_workers is {self.base.num_workers}, but asha stops trials of one worker "
                "only; set base.num_workers: 1, or leave the scheduler out"
            )
        if len(self.repeats) > 1:
            raise ValueError(
                "asha stops single trials, and the mean over what is left of a point's seeds would "
                "be biased; give one seed, or no scheduler"
            )
        if self.search == "tpe" and len(self.objectives) > 1:
            raise ValueError("asha sees one number; give one objective, or no scheduler")

    @property
    def swept_keys(self) -> tuple[str, ...]:
        """All keys in which trials differ, in the order of the file."""
        keys = [*self.space, *itertools.chain.from_iterable(self.points)]
        return tuple(dict.fromkeys(keys))

    @property
    def shown_keys(self) -> tuple[str, ...]:
        """The swept keys that distinguish trials: no group with swept keys below it."""
        keys = self.swept_keys
        return tuple(key for key in keys if not any(k.startswith(f"{key}.") for k in keys))

    @property
    def repeats(self) -> tuple[int, ...]:
        """Seeds of every point (that has none of its own)."""
        return self.seeds if self.seeds is not None else self.base.seeds

    def grid_points(self) -> list[dict[str, Any]]:
        """The points of the space for ``search: grid``, the last key varying fastest."""
        if not self.space:
            return []
        axes = [axis.grid() for axis in self.space.values()]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*axes)]


def sweep_keys(*, without_effect: bool = False) -> set[str]:
    """The dotted keys that may be swept; ``without_effect`` adds those that change no result."""
    keys = dotted_keys(ContinualStudy, without_effect=without_effect)
    return {*_OWN_KEYS, *(key for key in keys if key.partition(".")[0] not in _NOT_SWEPT)}


def dotted_keys(
    model: type[BaseModel], prefix: str = "", *, without_effect: bool = True
) -> set[str]:
    """All keys of a schema, those of groups inside it included, as ``--set`` takes them."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        if not without_effect and not affects_result(field):
            continue
        keys.add(f"{prefix}{name}")
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                keys |= dotted_keys(option, f"{prefix}{name}.", without_effect=without_effect)
    return keys


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SweepStudy:
    """Read a sweep file.

    ``base`` may be the path of a continual study, relative to the file. ``changes`` (dotted
    key → value) are set in the base, then ``overrides`` anywhere. Without a group ``mlflow``,
    the base's is used.

    Raises:
        ConfigError: no such file, not YAML, unknown key, a space that the search cannot take, …
    """
    file = os.fspath(path)
    values = _read_kind(file, "sweep")
    base = values.get("base")
    if isinstance(base, str):
        folder = file.rsplit("/", 1)[0] if "/" in file else "."
        absolute = base.startswith("/") or "://" in base
        base = _read_kind(base if absolute else storage.join(folder, base), "continual")
    if not isinstance(base, Mapping):
        raise ConfigError(
            f"{file}: 'base' must be a continual study: its keys, or the path of its file."
        )
    changes = values.pop("changes", None) or {}
    if not isinstance(changes, Mapping):
        raise ConfigError(f"{file}: 'changes' holds {type(changes).__name__}, expected keys.")
    values["base"] = set_keys(base, changes, f"{file}, changes")
    if "mlflow" not in values and "mlflow" in base:
        values["mlflow"] = base["mlflow"]
    values = set_keys(values, parse_overrides(overrides), file)
    if isinstance(values["base"], Mapping):  # trials write into the sweep's own folder
        values["base"] = {**values["base"], "output": str(values.get("output"))}
    return validate(SweepStudy, values, file)


def _read_kind(path: str, kind: str) -> dict[str, Any]:
    values = read_yaml(path, "a study file")
    if values.get("kind") != kind:
        raise ConfigError(
            f"{path} has kind {values.get('kind')!r}; expected a study with 'kind: {kind}'."
        )
    return values
