"""Layers that differ: in how many memories they have, and in which measures have a meaning.

    symbol   meaning
    m_l      memories of layer l, `d_mlp[l]`; 0 in a layer without feed-forward part; of a mixture
             of experts, those of all its experts

Tables of coefficients are as wide as the widest layer; what lies beyond a layer's own m_l is NaN.
A measure of a layer is computed from its own m_l columns alone. Where a layer has no value of a
measure, an `Absence` says why: the value is null, and totals are over the layers that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ke_ray.core.sums import SUMS, all_tables

_ROWS = "rows of coefficients"


class Absence(IntEnum):
    """Why a layer has no value of a measure; a number, so that it travels with the sums."""

    NONE = 0
    NO_FFN = 1
    NO_ATTENTION = 2
    ALIBI = 3
    SINKS = 4
    EXPERTS = 5

    @property
    def reason(self) -> str:
        """The same in words, for people and result files."""
        return _REASONS[self]


_REASONS = {
    Absence.NONE: "",
    Absence.NO_FFN: "the layer has no feed-forward part",
    Absence.NO_ATTENTION: "the layer has no softmax attention (it is a convolution, linear "
    "attention or a state space)",
    Absence.ALIBI: "attention scores carry ALiBi's fixed penalty of distance, so that a row's "
    "entropy tells the slope of its head more than what the model has learned",
    Absence.SINKS: "attention rows give a share to a learned sink, so that what they give to "
    "tokens is no distribution",
    Absence.EXPERTS: "the layer is a mixture of experts, whose coefficients are seen expert by "
    "expert and never in one row",
}


@dataclass(frozen=True)
class Layers:
    """Sizes of a model's layers, and what they lack.

    Attributes:
        d_mlp: memories of each layer, 0 without feed-forward part.
        absent: by table of sums, why each layer has no value; tables that all layers have are
            left out.
        experts: memories of each expert of each layer, in the order of the coefficients
            (`core.experts`); empty where no layer has experts.
    """

    d_mlp: tuple[int, ...]
    absent: Mapping[str, tuple[Absence, ...]] = field(default_factory=dict)
    experts: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        d_mlp: Sequence[int],
        attention: Sequence[Absence],
        experts: Sequence[tuple[int, ...]] = (),
    ) -> Layers:
        """Layers of these widths.

        Args:
            attention: why they have no attention entropy.
            experts: memories of their experts; a dense layer is one expert.
        """
        absent: dict[str, tuple[Absence, ...]] = {}
        if not all(d_mlp):
            missing = tuple(Absence.NONE if width else Absence.NO_FFN for width in d_mlp)
            absent = dict.fromkeys(
                ("coefficients", "coefficients_relu", "token_entropies"), missing
            )
        if any(attention):
            absent["attention_entropy"] = tuple(attention)
        is_mixture = any(len(sizes) > 1 for sizes in experts)
        if is_mixture:
            absent[_ROWS] = tuple(
                Absence.EXPERTS if len(sizes) > 1 else Absence.NONE if width else Absence.NO_FFN
                for width, sizes in zip(d_mlp, experts, strict=True)
            )
        return cls(tuple(d_mlp), absent, tuple(experts) if is_mixture else ())

    @property
    def expert_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Memories of each expert of each layer; a dense layer is one expert."""
        return self.experts or tuple((width,) for width in self.d_mlp)

    @property
    def common_d_mlp(self) -> int | None:
        """Memories per layer; None where layers differ."""
        return self.d_mlp[0] if len(set(self.d_mlp)) == 1 else None

    def absence(self, table: str, layer: int | None) -> Absence:
        """Why there is no value of a table at a layer, or (None) in total: where no layer has."""
        if table in SUMS and SUMS[table].tap == "coefficients":
            table = _ROWS if _ROWS in self.absent else "coefficients"
        absent = self.absent.get(table, ())
        if layer is not None:
            return absent[layer] if absent else Absence.NONE
        return min(absent, default=Absence.NONE)

    def per_layer(
        self,
        means: Mapping[str, Tensor],
        values: Callable[..., Tensor],
        *arguments: float,
        by_expert: bool = False,
    ) -> Tensor:
        """The values of a measure at every layer, each from the layer's own columns.

        Args:
            means: by table, its mean over instances, such as [n_layers, widest d_mlp] or
                [n_layers]; tables without layers are passed on as they are.
            values: the measure, called as ``values(*rows, *arguments)`` with the rows of each
                table; from [k, …] to [k].
            by_expert: whether it takes, last, the sizes of the experts of these k layers.

        Returns:
            [n_layers]; NaN where a layer has no value. [] where no table has layers.
        """
        tables, known = list(means.values()), all_tables()
        has_layers = ["n_layers" in known[table] for table in means]
        has_columns = ["d_mlp" in known[table] for table in means]
        absent = [
            any(self.absence(table, layer) for table in means) for layer in range(len(self.d_mlp))
        ]
        if not any(has_layers) or (not any(has_columns) and not any(absent)):
            return values(*tables, *arguments)
        shapes: Sequence[tuple[int, ...]] = self.expert_sizes
        if not by_expert:
            shapes = [(width if any(has_columns) else 1,) for width in self.d_mlp]
        if not any(absent) and len(set(shapes)) == 1:
            return values(*tables, *arguments, *([shapes[0]] if by_expert else []))
        device = tables[0].device
        result = torch.full((len(absent),), torch.nan, dtype=torch.float64, device=device)
        for shape in set(shapes):
            chosen = [i for i, own in enumerate(shapes) if own == shape and not absent[i]]
            if chosen:
                rows = [
                    mean[chosen, : sum(shape)] if columns else mean[chosen] if own else mean
                    for mean, own, columns in zip(tables, has_layers, has_columns, strict=True)
                ]
                experts = [shape] if by_expert else []
                result[chosen] = values(*rows, *arguments, *experts).double()
        return result

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dictionary for shipping."""
        flat = {"d_mlp": torch.tensor(self.d_mlp, dtype=torch.int64)}
        for table, absent in self.absent.items():
            flat[f"absent.{table}"] = torch.tensor(absent, dtype=torch.int64)
        if self.experts:
            flat["experts"] = pad_sequence([torch.tensor(row) for row in self.experts], True)
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Any]) -> Layers:
        """The inverse of `to_tensors`; other keys are passed over."""
        absent = {
            name.removeprefix("absent."): tuple(Absence(code) for code in codes.tolist())
            for name, codes in flat.items()
            if name.startswith("absent.")
        }
        rows = flat["experts"].tolist() if "experts" in flat else []
        experts = tuple(tuple(size for size in row if size) for row in rows)
        return cls(tuple(flat["d_mlp"].tolist()), absent, experts)
