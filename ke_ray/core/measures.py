"""The measures of a checkpoint, and their values and errors from merged sums.

Each measure is a function of the mean over instances of one quantity (`GroupSums`). It is
evaluated once on all instances and once without each jackknife group; the standard error comes
from the latter (`jackknife`), and they are kept, so that differences between checkpoints on the
same data get paired errors. The dormant share has neither: it counts memories on one side of a
threshold, and the jackknife of a count is 2 to 3 times too large.

A measure is declared once (`core.measure`). `register` adds a measure of your own, which may bring
a sum of its own along (`core.sums`). Importing this module needs no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ke_ray.core.intervention import Intervention
from ke_ray.core.jackknife import standard_error
from ke_ray.core.measure import BUILT_IN, Measure, measure_named
from ke_ray.core.sums import OF_LOGITS, SUMS, Sum, add_sum, all_tables
from ke_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from ke_ray.core.layers import Absence, Layers
    from ke_ray.core.statistics import GroupSums

MEASURE_VERSION = 1
"""Raised when a definition changes, so that results of two definitions are never mixed."""


ENTRY_POINTS = "ke_ray.measures"
"""The group of entry points by which a package offers measures, each under the measure's name."""

MEASURES: dict[str, Measure] = {measure.name: measure for measure in BUILT_IN}

for _sum in (own for measure in BUILT_IN for own in measure.needs_all if isinstance(own, Sum)):
    add_sum(_sum)


DEFAULT_MEASURES = tuple(name for name, measure in MEASURES.items() if measure.is_default)


def register(measure: Measure) -> None:
    """Add a measure of your own to `MEASURES`, in this process.

    `evaluate`, `score_model` and study files then accept its name. The workers of a scan know it
    where the scan was given the file that declares it (`--measure my.py:spread`), or a package has
    it as an entry point ``ke_ray.measures``.

        def largest(mean):  # [n_layers, d_mlp] -> [n_layers]
            return mean.amax(dim=-1) / mean.sum(dim=-1)

        register(Measure(name="largest_memory", title="Largest memory", doc="max p",
                         unit="fraction", needs="coefficients", values=largest, total="mean"))

    Raises:
        UserError: there is another measure, or another sum, of this name; it needs a table that
            does not exist, or its total does not go with the layers of its tables.
    """
    if MEASURES.get(measure.name) == measure:
        return
    if measure.name in MEASURES:
        raise UserError(
            f"there is a measure {measure.name!r} already; give yours another name than "
            f"{', '.join(MEASURES)}"
        )
    if not (measure.name.isidentifier() and re.fullmatch(r"[\w /.-]+", measure.unit, re.ASCII)):
        raise UserError(
            f"measure {measure.name!r} has the unit {measure.unit!r}; expected a name of letters, "
            "digits and '_', and a unit of these, spaces, '/', '.' and '-' (MLflow takes no others)"
        )
    brought = [need for need in measure.needs_all if not isinstance(need, str)]
    known = all_tables() | {own.name: own.table_axes for own in brought}
    for table in measure.tables:
        if table not in known:
            raise UserError(
                f"measure {measure.name!r} needs {table!r}, which is no sum."
                f"{nearest(table, known)} Sums: {', '.join(known)}"
            )
    has_layers = any("n_layers" in known[table] for table in measure.tables)
    if has_layers == (measure.total == "only"):
        expected = "'sum' or 'mean', over the layers of" if has_layers else "'only', as there are "
        expected += " its sums" if has_layers else "no layers in its sums"
        raise UserError(
            f"measure {measure.name!r} has total {measure.total!r}; expected {expected}"
        )
    for own in brought:
        add_sum(own)
    MEASURES[measure.name] = measure


def unregister(name: str) -> None:
    """Forget a measure of your own, and the sums that it alone brought along."""
    gone = MEASURES.pop(name)
    kept = {table for measure in MEASURES.values() for table in measure.tables}
    for table in set(gone.tables) - kept:
        SUMS.pop(table, None)


def _by_number(name: str) -> bool:
    """Register the measure of a name that holds a number; whether there is one."""
    measure = measure_named(name)
    if measure is None:
        return False
    for own in measure.needs_all:
        if not isinstance(own, str):
            add_sum(own)
    MEASURES[name] = measure
    return True


def declaration(name: str) -> Measure | None:
    """What ke_ray knows of a name that stands in results; None where it is of others."""
    with suppress(UserError):
        return MEASURES.get(name) or measure_named(name)
    return None


def _of_package(name: str) -> bool:
    """Register the measure that an installed package has under this name; whether one has.

    Raises:
        UserError: the package cannot be imported, or has something else there.
    """
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            measure = entry.load()
        except Exception as error:
            raise UserError(
                f"measure {name!r} of {package} ({entry.value}): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(measure, Measure) or measure.name != name:
            raise UserError(
                f"measure {name!r} of {package}: {entry.value} is {measure!r:.80}; expected a "
                f"ke_ray.core.measure.Measure with the name {name!r}"
            )
        register(replace(measure, origin=package))
        return True
    return False


@dataclass(frozen=True)
class MeasureRow:
    """One value: a measure at a layer, or its total over the layers that have one (layer None).

    Attributes:
        value: NaN where the measure has no meaning at the layer, and `reason` says why.
        stderr: NaN where there is none: of one instance, and of a measure that is not smooth.
        d_mlp: memories of the layer; of a total, of every layer, None where they differ.
    """

    layer: int | None
    measure: str
    value: float
    stderr: float
    unit: str
    d_mlp: int | None = None
    reason: str | None = None


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
        """Whether every value that has a meaning is a finite number (errors may be NaN)."""
        return all(np.isfinite(row.value) for row in self.rows if row.reason is None)


def check_measures(names: str | Sequence[str]) -> tuple[str, ...]:
    """The requested measures, each once, in the order of `MEASURES`.

    A name that ke_ray does not have is looked up among the entry points of installed packages.

    Args:
        names: names of `MEASURES`, or one text that holds them separated by commas.

    Raises:
        UserError: no name, or an unknown one (the nearest is offered).
    """
    available = ", ".join(MEASURES)
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        raise UserError(f"no measure was requested; name at least one of {available}")
    for name in names:
        if name not in MEASURES and not _by_number(name) and not _of_package(name):
            raise UserError(
                f"unknown measure {name!r}.{nearest(name, MEASURES)} Measures: {available}, and "
                "those with a number in their name (docs/measures.md)"
            )
    return tuple(name for name in MEASURES if name in names)


def required_sums(names: str | Sequence[str]) -> tuple[str, ...]:
    """The tables of `GroupSums` that these measures need, each once.

    Raises:
        UserError: as `check_measures`.
    """
    chosen = check_measures(names)
    return tuple(dict.fromkeys(table for name in chosen for table in MEASURES[name].tables))


def needing_head(names: str | Sequence[str]) -> tuple[str, ...]:
    """Those of these measures that a model without language-model head cannot have.

    Raises:
        UserError: as `check_measures`.
    """
    return tuple(
        name
        for name in check_measures(names)
        if set(OF_LOGITS).intersection(MEASURES[name].tables) or interventions_of(name)
    )


def interventions_of(names: str | Sequence[str]) -> tuple[Intervention, ...]:
    """The changes of the model that these measures need, each once.

    Raises:
        UserError: as `check_measures`.
    """
    needs = (need for name in check_measures(names) for need in MEASURES[name].needs_all)
    return tuple(dict.fromkeys(need for need in needs if isinstance(need, Intervention)))


def needs_usage(names: str | Sequence[str]) -> bool:
    """Whether one of these measures goes by C̄ before anything is measured.

    Raises:
        UserError: as `check_measures`.
    """
    return any(own.kind == "mask" for own in interventions_of(names))


def evaluate(
    sums: GroupSums,
    measures: str | Sequence[str],
    *,
    top_k_fraction: float = 0.01,
    dormant_threshold: float = 0.1,
) -> Evaluation:
    """Values, jackknife errors and leave-one-out replicates of the requested measures.

    Nothing else is computed, and the means of one group exist at a time: memory is that of one
    [n_layers, d_mlp] float64 beyond the sums.

    Args:
        sums: merged sums over all of D that hold the tables the measures need.
        measures: names of `MEASURES`.
        top_k_fraction: for `top_k_mass`, in (0, 1].
        dormant_threshold: τ for `dormant_share`, ≥ 0.

    Raises:
        UserError: an unknown measure or a parameter out of range.
        ValueError: a table that a measure needs was not summed.
    """
    requested = check_measures(measures)
    missing = [table for table in required_sums(requested) if table not in sums.tables]
    if missing:
        raise ValueError(f"measures {list(requested)} need the sums {missing}, which were not kept")
    parameters = _checked_parameters(top_k_fraction, dormant_threshold)
    columns: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in requested}
    for tables in dict.fromkeys(MEASURES[name].tables for name in requested):
        measures_of_tables = [
            MEASURES[name] for name in requested if MEASURES[name].tables == tables
        ]
        with_errors = any(measure.has_error for measure in measures_of_tables)
        series_of = [
            itertools.chain([sums.mean(table)], sums.leave_one_out(table) if with_errors else ())
            for table in tables
        ]
        for number, means in enumerate(zip(*series_of, strict=True)):
            for measure in measures_of_tables:
                if number > 0 and not measure.has_error:
                    continue
                arguments = [parameters[measure.parameter]] if measure.parameter else []
                values = sums.layers.per_layer(
                    dict(zip(tables, means, strict=True)),
                    measure.values,
                    *arguments,
                    by_expert=measure.by_expert,
                )
                columns[measure.name].append(values.cpu().numpy())
    counts = sums.counts.numpy().copy()
    rows: list[MeasureRow] = []
    replicates: dict[tuple[int | None, str], npt.NDArray[np.float64]] = {}
    for name in requested:
        measure = MEASURES[name]
        series = np.stack(columns[name], axis=-1)  # [n_layers, 1 + G], or [1 + G] without layers
        for layer, (value, *left_out) in _series(series, measure, sums.layers):
            absence = _absence(sums.layers, measure, layer)
            error = np.nan
            if measure.has_error and not absence:
                error = float(standard_error(value, left_out, counts))
                replicates[(layer, name)] = np.array(left_out)
            d_mlp = sums.layers.common_d_mlp if layer is None else sums.layers.d_mlp[layer]
            reason = absence.reason or None
            rows.append(MeasureRow(layer, name, float(value), error, measure.unit, d_mlp, reason))
    return Evaluation(tuple(rows), replicates, counts, sums.total_instances, sums.total_tokens)


def _series(
    values: npt.NDArray[np.float64], measure: Measure, layers: Layers
) -> Iterator[tuple[int | None, npt.NDArray[np.float64]]]:
    """(layer, [1 + G]) for every layer, then for the total over the layers that have a value."""
    if measure.total == "only":
        yield None, values
        return
    yield from enumerate(values)
    present = [i for i in range(len(values)) if not _absence(layers, measure, i)]
    if not present:
        yield None, np.full(values.shape[1], np.nan)
    elif measure.total == "sum":
        yield None, values[present].sum(axis=0)
    else:
        yield None, values[present].mean(axis=0)


def _absence(layers: Layers, measure: Measure, layer: int | None) -> Absence:
    """Why a measure has no value at a layer, or in total; of the first table that it lacks."""
    absences = [layers.absence(table, layer) for table in measure.tables]
    return next((absence for absence in absences if absence), absences[0])


def _checked_parameters(top_k_fraction: float, dormant_threshold: float) -> dict[str, float]:
    from ke_ray.core import concentration

    concentration.check_top_k_fraction(top_k_fraction)
    concentration.check_dormant_threshold(dormant_threshold)
    return {"top_k_fraction": top_k_fraction, "dormant_threshold": dormant_threshold}
