"""One axis of a sweep's space: the values that one key may take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from ke_ray.config import Strict

_MAX_GRID_INTEGERS = 1000
_MAX_INTEGER = 2**62


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


class Axis(Strict):
    """The values of one key, by exactly one of the four kinds; a plain list is a ``choice``."""

    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], low above 0")
    integer: tuple[int, int] | None = Field(
        None, alias="int", description="[low, high], both ends included"
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_choice(cls, value: Any) -> Any:
        return {"choice": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        names = ("choice", "uniform", "loguniform", "integer")
        kinds = [name for name in names if getattr(self, name)]
        if self.choice is not None and not self.choice:
            raise ValueError("choice has no values")
        if len(kinds) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform and int")
        if self.choice is not None:
            # 1, 1.0 and true are one value, to Optuna as to Python.
            distinct = {v if _is_scalar(v) else json.dumps(v, sort_keys=True) for v in self.choice}
            if len(distinct) < len(self.choice):
                raise ValueError(f"choice {list(self.choice)} holds a value twice")
            return self
        low, high = getattr(self, kinds[0])
        if not low < high:
            raise ValueError(f"{kinds[0]} [{low}, {high}] is empty; the low end comes first")
        if self.integer is not None and max(-low, high) >= _MAX_INTEGER:
            raise ValueError(f"int [{low}, {high}] goes beyond 64 bits")
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"loguniform [{low}, {high}] needs a low end above 0")
        return self

    def grid(self) -> tuple[Any, ...]:
        """All values.

        Raises:
            ValueError: the axis is continuous, or too long.
        """
        if self.choice is not None:
            return self.choice
        if self.integer is not None:
            low, high = self.integer
            if high - low >= _MAX_GRID_INTEGERS:
                raise ValueError(f"int [{low}, {high}] has more than {_MAX_GRID_INTEGERS} values")
            return tuple(range(low, high + 1))
        raise ValueError("a grid needs choice or int; uniform and loguniform go with random or tpe")

    def samples(self) -> tuple[Any, ...]:
        """Values whose validity implies that of the whole axis: all choices, else both ends.

        A continuous axis adds one between them, which is not an integer.
        """
        if self.choice is not None:
            return self.choice
        if self.integer is not None:
            return self.integer
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        return low, high, low + (high - low) / 2**0.5

    def size(self) -> int | None:
        """The number of values; None for a continuous axis."""
        if self.choice is not None:
            return len(self.choice)
        return self.integer[1] - self.integer[0] + 1 if self.integer is not None else None


def check_optuna(space: Mapping[str, Axis], num_trials: int | None) -> None:
    """Check that Optuna can draw that many points.

    Raises:
        ValueError: a choice that it cannot take, or too few points.
    """
    for key, axis in space.items():
        for value in axis.choice or ():
            if not _is_scalar(value):
                raise ValueError(
                    f"space.{key}: Optuna takes numbers, texts, true, false and null as choices, "
                    f"not {value!r}; sweep the keys of the group one by one, or put it under points"
                )
    sizes = [axis.size() for axis in space.values()]
    num_points = math.prod(size for size in sizes if size is not None)
    if None not in sizes and num_trials is not None and num_points < num_trials:
        raise ValueError(
            f"the space has only {num_points} different points, but num_trials is {num_trials}; "
            "lower it, or use search: grid"
        )
