"""The measures of a checkpoint, and their values and errors from merged sums.

Each measure is a function of the mean over instances of one quantity (`GroupSums`). It is
evaluated once on all instances and once without each jackknife group; the standard error comes
from the latter (`jackknife`), and they are kept, so that differences between checkpoints on the
same data get paired errors. The dormant share has neither: it counts memories on one side of a
threshold, and the jackknife of a count is 2 to 3 times too large.

A measure is declared once, in `MEASURES`. Study files, figures and the table in
``docs/results.md`` derive from there. `register` adds a measure of your own.

Equations: arXiv 2410.01380. This module imports torch only when it evaluates, so that names and
units can be checked cheaply.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ke_ray.core.jackknife import standard_error
from ke_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ke_ray.core.layers import Layers
    from ke_ray.core.statistics import GroupSums

MEASURE_VERSION = 1
"""Raised when a definition changes, so that results of two definitions are never mixed."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The declaration of a measure.

    Attributes:
        name: in study files and in `entropy.parquet`.
        title: for people, in figures and tables.
        doc: what the value of a layer is, in one line.
        unit: of the values, such as nats, memories or fraction.
        needs: the table of `GroupSums` that it is computed from, or several.
        values: from the mean of each table over instances, float64 [n_layers, …], to the values
            [n_layers]; [] to [] where the table has no layers.
        total: over layers, the sum or the mean; 'only' where the table has no layers.
        parameter: the argument of `evaluate` that `values` takes beside the mean.
        is_smooth: whether the jackknife holds; a measure that is not smooth has no error.
        is_default: whether a scan evaluates it where its study names no measures.
        by_expert: whether `values` takes, last, the memories of each expert of these layers
            (`core.experts`). A scan of a mixture of experts evaluates such a measure by default.
        direction: which values are better, where that can be said.
    """

    name: str
    title: str
    doc: str
    unit: str
    needs: str | tuple[str, ...]
    values: Callable[..., Tensor]
    total: Literal["sum", "mean", "only"]
    parameter: Literal["top_k_fraction", "dormant_threshold"] | None = None
    is_smooth: bool = True
    is_default: bool = True
    by_expert: bool = False
    direction: Literal["minimize", "maximize"] | None = None

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it needs, in the order in which `values` takes them."""
        return (self.needs,) if isinstance(self.needs, str) else self.needs


def _core(module: str, function: str) -> Callable[..., Tensor]:
    """A function of a module of this package, which is imported at the first call for torch."""

    def call(*arguments: object) -> Tensor:
        values: Tensor = getattr(import_module(f"ke_ray.core.{module}"), function)(*arguments)
        return values

    return call


def _unchanged(mean: Tensor) -> Tensor:
    return mean


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            name="knowledge_entropy",
            title="Knowledge entropy",
            doc="−Σ p ln p, p = C̄ˡ/ΣC̄ˡ (Eq. 2)",
            unit="nats",
            needs="coefficients",
            values=_core("entropy", "entropy_nats"),
            total="sum",
        ),
        Measure(
            name="knowledge_entropy_relu",
            title="Knowledge entropy, ReLU variant",
            doc="the same for |ReLU(gate)·up| (A.2)",
            unit="nats",
            needs="coefficients_relu",
            values=_core("entropy", "entropy_nats"),
            total="sum",
            is_default=False,
        ),
        Measure(
            name="token_entropy",
            title="Entropy of single tokens",
            doc="Σ_t w_t H(p_t): entropy of one token's coefficients, tokens weighted by their "
            "share of ΣC̄ˡ",
            unit="nats",
            needs=("token_entropies", "coefficients"),
            values=_core("token_entropy", "token_entropy"),
            total="sum",
            is_default=False,
        ),
        Measure(
            name="memory_information",
            title="Information between token and memory",
            doc="I(token; memory) = `knowledge_entropy` − `token_entropy`: how far tokens draw on "
            "different memories",
            unit="nats",
            needs=("token_entropies", "coefficients"),
            values=_core("token_entropy", "memory_information"),
            total="sum",
            is_default=False,
        ),
        Measure(
            name="attention_entropy",
            title="Attention entropy",
            doc="entropy of causal attention rows (Eq. 3)",
            unit="nats",
            needs="attention_entropy",
            values=_unchanged,
            total="sum",
        ),
        Measure(
            name="next_token_entropy",
            title="Next-token entropy",
            doc="entropy of softmax(logits) (A.4)",
            unit="nats",
            needs="next_token_entropy",
            values=_unchanged,
            total="only",
        ),
        Measure(
            name="loss",
            title="Loss",
            doc="−ln p of the token that follows, mean over all predicted tokens of D",
            unit="nats",
            needs=("token_nats", "predictions"),
            values=_core("prediction", "loss"),
            total="only",
            is_default=False,
            direction="minimize",
        ),
        Measure(
            name="perplexity",
            title="Perplexity",
            doc="exp(`loss`)",
            unit="tokens",
            needs=("token_nats", "predictions"),
            values=_core("prediction", "perplexity"),
            total="only",
            is_default=False,
            direction="minimize",
        ),
        Measure(
            name="effective_memories",
            title="Effective number of memories",
            doc="exp(H), H = −Σ p ln p",
            unit="memories",
            needs="coefficients",
            values=_core("entropy", "effective_memories"),
            total="sum",
        ),
        Measure(
            name="participation_ratio",
            title="Participation ratio",
            doc="(Σp)²/Σp² / d_mlp",
            unit="fraction",
            needs="coefficients",
            values=_core("concentration", "participation_ratio"),
            total="mean",
        ),
        Measure(
            name="gini",
            title="Gini coefficient",
            doc="Gini coefficient of C̄ˡ",
            unit="fraction",
            needs="coefficients",
            values=_core("concentration", "gini"),
            total="mean",
        ),
        Measure(
            name="top_k_mass",
            title="Mass of the largest memories",
            doc="share of ΣC̄ˡ in the largest `top_k_fraction` (1 %) of memories",
            unit="fraction",
            needs="coefficients",
            values=_core("concentration", "top_k_mass"),
            total="mean",
            parameter="top_k_fraction",
        ),
        Measure(
            name="dormant_share",
            title="Dormant share",
            doc="share of memories with C̄ˡ ≤ `dormant_threshold` (0.1) · mean C̄ˡ",
            unit="fraction",
            needs="coefficients",
            values=_core("concentration", "dormant_share"),
            total="mean",
            parameter="dormant_threshold",
            is_smooth=False,
        ),
        Measure(
            name="routing_entropy",
            title="Routing entropy",
            doc="H(π), π the experts' shares of ΣC̄ˡ; 0 in a dense layer",
            unit="nats",
            needs="coefficients",
            values=_core("experts", "routing_entropy"),
            total="sum",
            is_default=False,
            by_expert=True,
        ),
        Measure(
            name="within_expert_entropy",
            title="Entropy within experts",
            doc="Σ π_e H_e = `knowledge_entropy` − `routing_entropy`",
            unit="nats",
            needs="coefficients",
            values=_core("experts", "within_expert_entropy"),
            total="sum",
            is_default=False,
            by_expert=True,
        ),
    )
}

DEFAULT_MEASURES = tuple(name for name, measure in MEASURES.items() if measure.is_default)


def register(measure: Measure) -> None:
    """Add a measure of your own to `MEASURES`, in this process.

    `evaluate`, `score_model` and study files then accept its name. Other processes, such as the
    workers of a scan, know it only if they register it too.

        def largest(mean):  # [n_layers, d_mlp] -> [n_layers]
            return mean.amax(dim=-1) / mean.sum(dim=-1)

        register(Measure(name="largest_memory", title="Largest memory", doc="max p",
                         unit="fraction", needs="coefficients", values=largest, total="mean"))

    Raises:
        UserError: there is another measure of this name.
    """
    if MEASURES.setdefault(measure.name, measure) != measure:
        raise UserError(
            f"there is a measure {measure.name!r} already; give yours another name than "
            f"{', '.join(MEASURES)}"
        )


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
        if name not in MEASURES:
            raise UserError(
                f"unknown measure {name!r}.{nearest(name, MEASURES)} Measures: {available}"
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
    from ke_ray.core.statistics import OF_LOGITS

    return tuple(n for n in check_measures(names) if set(MEASURES[n].tables) & set(OF_LOGITS))


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
        series_of = [itertools.chain([sums.mean(t)], sums.leave_one_out(t)) for t in tables]
        for number, means in enumerate(zip(*series_of, strict=True)):
            for measure in measures_of_tables:
                if number > 0 and not measure.is_smooth:
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
            absence = sums.layers.absence(measure.tables[0], layer)
            error = np.nan
            if measure.is_smooth and not absence:
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
    present = [i for i in range(len(values)) if not layers.absence(measure.tables[0], i)]
    if not present:
        yield None, np.full(values.shape[1], np.nan)
    elif measure.total == "sum":
        yield None, values[present].sum(axis=0)
    else:
        yield None, values[present].mean(axis=0)


def _checked_parameters(top_k_fraction: float, dormant_threshold: float) -> dict[str, float]:
    from ke_ray.core import concentration

    concentration.check_top_k_fraction(top_k_fraction)
    concentration.check_dormant_threshold(dormant_threshold)
    return {"top_k_fraction": top_k_fraction, "dormant_threshold": dormant_threshold}
