"""The measures of a checkpoint, and their values and errors from merged sums.

Each measure is a function of the mean over instances of one quantity (`GroupSums`). It is
evaluated once on all instances and once without each jackknife group; the standard error comes
from the latter (`jackknife`), and they are kept, so that differences between checkpoints on the
same data get paired errors. The dormant share has neither: it counts memories on one side of a
threshold, and the jackknife of a count is 2 to 3 times too large.

    measure                sums               total over layers   unit
    knowledge_entropy      coefficients       sum                 nats       Eq. 2
    knowledge_entropy_relu coefficients_relu  sum                 nats       A.2
    attention_entropy      attention_entropy  sum                 nats       Eq. 3
    next_token_entropy     next_token_entropy the only value      nats       A.4
    effective_memories     coefficients       sum                 memories   exp(H)
    participation_ratio    coefficients       mean                fraction   `concentration`
    gini                   coefficients       mean                fraction
    top_k_mass             coefficients       mean                fraction
    dormant_share          coefficients       mean                fraction

Equations: arXiv 2410.01380. This module imports torch only when it evaluates, so that names and
units can be checked cheaply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ke_ray.core.jackknife import standard_error
from ke_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ke_ray.core.statistics import GroupSums

__all__ = [
    "MEASURES",
    "MEASURE_VERSION",
    "Evaluation",
    "Measure",
    "MeasureRow",
    "check_measures",
    "evaluate",
    "required_sums",
]

MEASURE_VERSION = 1
"""Raised when a definition changes, so that results of two definitions are never mixed."""


@dataclass(frozen=True)
class Measure:
    """What a measure is computed from and how its layers make a total.

    Attributes:
        name: as in `entropy.parquet`.
        unit: 'nats', 'memories' or 'fraction'.
        total: over layers, 'sum' or 'mean'; 'only' for a measure that has no layers.
        needs: the table of `GroupSums` it is computed from.
        is_smooth: whether the jackknife holds; a measure that is not smooth has no error.
    """

    name: str
    unit: Literal["nats", "memories", "fraction"]
    total: Literal["sum", "mean", "only"]
    needs: str
    is_smooth: bool = True


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("knowledge_entropy", "nats", "sum", "coefficients"),
        Measure("knowledge_entropy_relu", "nats", "sum", "coefficients_relu"),
        Measure("attention_entropy", "nats", "sum", "attention_entropy"),
        Measure("next_token_entropy", "nats", "only", "next_token_entropy"),
        Measure("effective_memories", "memories", "sum", "coefficients"),
        Measure("participation_ratio", "fraction", "mean", "coefficients"),
        Measure("gini", "fraction", "mean", "coefficients"),
        Measure("top_k_mass", "fraction", "mean", "coefficients"),
        Measure("dormant_share", "fraction", "mean", "coefficients", is_smooth=False),
    )
}


@dataclass(frozen=True)
class MeasureRow:
    """One value: a measure at a layer, or its total (layer None).

    `stderr` is NaN where there is none: of one instance, and of a measure that is not smooth.
    """

    layer: int | None
    measure: str
    value: float
    stderr: float
    unit: str


@dataclass(frozen=True)
class Evaluation:
    """All values of one checkpoint on one dataset.

    Attributes:
        rows: measures in the order of `MEASURES`, layers ascending, the total last.
        replicates: float64 [G] by (layer or None, measure): the value without group g; of smooth
            measures.
        group_counts: int64 [G], the instances in each group.
        num_instances, num_tokens: what the values are over.
    """

    rows: tuple[MeasureRow, ...]
    replicates: dict[tuple[int | None, str], npt.NDArray[np.float64]]
    group_counts: npt.NDArray[np.int64]
    num_instances: int
    num_tokens: int

    def row(self, measure: str, layer: int | None = None) -> MeasureRow:
        """The row of a measure at a layer, by default its total.

        Raises:
            UserError: there is no such row; the message names those that there are.
        """
        for row in self.rows:
            if row.measure == measure and row.layer == layer:
                return row
        layers = [row.layer for row in self.rows if row.measure == measure]
        if not layers:
            measures = list(dict.fromkeys(row.measure for row in self.rows))
            raise UserError(
                f"{measure!r} was not evaluated; this evaluation has {', '.join(measures)}."
                f"{nearest(str(measure), measures)} Others: score_model(…, measures=[…])."
            )
        numbers = [number for number in layers if number is not None]
        span = f"layers {min(numbers)} to {max(numbers)} and the total" if numbers else "a total"
        raise UserError(
            f"{measure} has no layer {layer!r}; it has {span} (leave layer out for the total)."
        )

    def is_finite(self) -> bool:
        """Whether every value is a finite number (errors may be NaN)."""
        return all(np.isfinite(row.value) for row in self.rows)


def check_measures(names: str | Sequence[str]) -> tuple[str, ...]:
    """The measures asked for, each once, in the order of `MEASURES`.

    Args:
        names: names of `MEASURES`, or one text that holds them separated by commas.

    Raises:
        UserError: none asked for, or an unknown name (the nearest is offered).
    """
    known = ", ".join(MEASURES)
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        raise UserError(f"no measure was asked for; choose at least one of {known}")
    for name in names:
        if name not in MEASURES:
            raise UserError(f"unknown measure {name!r}.{nearest(name, MEASURES)} Known: {known}")
    return tuple(name for name in MEASURES if name in names)


def required_sums(names: str | Sequence[str]) -> tuple[str, ...]:
    """The tables of `GroupSums` that these measures need, each once.

    Raises:
        UserError: as `check_measures`.
    """
    return tuple(dict.fromkeys(MEASURES[name].needs for name in check_measures(names)))


def evaluate(
    sums: GroupSums,
    measures: str | Sequence[str],
    *,
    top_k_fraction: float = 0.01,
    dormant_threshold: float = 0.1,
) -> Evaluation:
    """Values, jackknife errors and leave-one-out replicates of the measures asked for.

    Only what is asked for is computed, and one group's means are held at a time: memory is that
    of one [n_layers, d_mlp] float64 beyond the sums.

    Args:
        sums: merged sums over all of D that hold the tables the measures need.
        measures: names of `MEASURES`.
        top_k_fraction: for `top_k_mass`, in (0, 1].
        dormant_threshold: τ for `dormant_share`, ≥ 0.

    Raises:
        UserError: an unknown measure or a parameter out of range.
        ValueError: a table that a measure needs was not summed.
    """
    chosen = check_measures(measures)
    missing = [table for table in required_sums(chosen) if table not in sums.tables]
    if missing:
        raise ValueError(f"measures {list(chosen)} need the sums {missing}, which were not kept")
    functions = _functions(top_k_fraction, dormant_threshold)
    columns: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in chosen}
    for table in required_sums(chosen):
        names = [name for name in chosen if MEASURES[name].needs == table]
        for number, mean in enumerate(_means(sums, table)):
            for name in names if number == 0 else [n for n in names if MEASURES[n].is_smooth]:
                columns[name].append(functions[name](mean).cpu().numpy())
    counts = sums.counts.numpy().copy()
    rows: list[MeasureRow] = []
    replicates: dict[tuple[int | None, str], npt.NDArray[np.float64]] = {}
    for name in chosen:
        values = np.stack(columns[name], axis=-1)  # [n_layers, 1 + G], or [1 + G] without layers
        for layer, series in _series(values, MEASURES[name].total):
            error = np.nan
            if MEASURES[name].is_smooth:
                error = float(standard_error(series[0], series[1:], counts))
                replicates[(layer, name)] = series[1:].copy()
            rows.append(MeasureRow(layer, name, float(series[0]), error, MEASURES[name].unit))
    return Evaluation(tuple(rows), replicates, counts, sums.total_instances, sums.total_tokens)


def _means(sums: GroupSums, table: str) -> Iterator[Tensor]:
    """The mean over all instances, then the means that leave one group out."""
    yield sums.mean(table)
    yield from sums.leave_one_out(table)


def _series(
    values: npt.NDArray[np.float64], total: str
) -> Iterator[tuple[int | None, npt.NDArray[np.float64]]]:
    """(layer, [1 + G]) for every layer, then for the total."""
    if total == "only":
        yield None, values
        return
    yield from enumerate(values)
    yield None, values.sum(axis=0) if total == "sum" else values.mean(axis=0)


def _functions(
    top_k_fraction: float, dormant_threshold: float
) -> dict[str, Callable[[Tensor], Tensor]]:
    """From the mean of a measure's table to its value per layer."""
    from ke_ray.core import concentration, entropy

    concentration.check_top_k_fraction(top_k_fraction)
    concentration.check_dormant_threshold(dormant_threshold)

    def already_averaged(mean: Tensor) -> Tensor:
        return mean

    return {
        "knowledge_entropy": entropy.entropy_nats,
        "knowledge_entropy_relu": entropy.entropy_nats,
        "attention_entropy": already_averaged,
        "next_token_entropy": already_averaged,
        "effective_memories": entropy.effective_memories,
        "participation_ratio": concentration.participation_ratio,
        "gini": concentration.gini,
        "top_k_mass": lambda mean: concentration.top_k_mass(mean, top_k_fraction),
        "dormant_share": lambda mean: concentration.dormant_share(mean, dormant_threshold),
    }
