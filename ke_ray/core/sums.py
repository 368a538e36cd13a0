"""The sums that measures are computed from: built in, or brought along by a measure.

What the built-in ones are stands in `core.statistics`. A measure may bring a `Sum` of its own,
which says what it looks at in a forward pass, and what it adds up. A pass can be tapped in two
places; both show one instance at a time, its real tokens only:

    tap            rows                                            shape
    coefficients   C, input of a layer's FFN's second projection   [T_n, d_mlp], layer by layer
    hidden         final hidden states, after the final norm       [T_n, d_model], once
                   or, of a sum with a `layer`, the residual stream behind that layer

Rows are copies, in float32 at least. In a mixture of experts the coefficients of a token are seen
expert by expert and never stand in one row: there, a sum at `coefficients` is null with its reason.

A measure may also need an `Intervention` (`core.intervention`): the loss of the changed model.

Importing this module needs no torch, so that measures can be declared cheaply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ke_ray.core.intervention import INTERVENED, Intervention
from ke_ray.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A sum over the instances of D, kept per jackknife group beside the built-in ones.

    Attributes:
        name: of the table; no other sum has it.
        tap: where the pass is looked at.
        of_instance: from the rows of one instance, [T_n, width], to what it adds: a tensor of the
            shape of `axes`. For a token mean it divides by T_n itself.
        axes: of what `of_instance` returns, beside the layers: none (one number), or any of `d_mlp`
            (with the tap `coefficients`), `d_model` and `d_model+1`.
        layer: with the tap `hidden`, the decoder layer behind which the residual stream is looked
            at, from 0 up to the last but one; None: the final hidden states.
        is_pooled: kept once and not once per group, for tables too large for 64 copies. Measures
            of a pooled sum have no error.
    """

    name: str
    tap: Literal["coefficients", "hidden"]
    of_instance: Callable[[Tensor], Tensor]
    axes: tuple[Literal["d_mlp", "d_model", "d_model+1"], ...] = ()
    layer: int | None = None
    is_pooled: bool = False

    @property
    def table_axes(self) -> tuple[str, ...]:
        """Axes of the table behind that of the groups."""
        return ("n_layers", *self.axes) if self.tap == "coefficients" else self.axes


#: Built-in tables → their axes behind that of the groups.
TABLES: dict[str, tuple[str, ...]] = {
    "coefficients": ("n_layers", "d_mlp"),
    "coefficients_relu": ("n_layers", "d_mlp"),
    "token_entropies": ("n_layers",),
    "attention_entropy": ("n_layers",),
    "next_token_entropy": (),
    "token_nats": (),
    "predictions": (),
    "expert_load": ("n_layers", "n_experts"),
    INTERVENED: (),
}

#: Tables that are computed from logits, for which a model needs its language-model head.
OF_LOGITS = ("next_token_entropy", "token_nats")

SUMS: dict[str, Sum | Intervention] = {}
"""The sums that measures brought along, by name."""


def add_sum(own: Sum | Intervention) -> None:
    """Make a sum known in this process.

    Raises:
        UserError: there is another sum of this name, or its axes do not go with its tap.
    """
    if SUMS.get(own.name) == own:
        return
    if own.name in SUMS or own.name in TABLES:
        raise UserError(f"there is a sum {own.name!r} already; give yours another name")
    if isinstance(own, Intervention):
        SUMS[own.name] = own
        return
    if own.tap == "coefficients" and own.axes not in ((), ("d_mlp",)):
        raise UserError(
            f"sum {own.name!r} has axes {own.axes}; with the tap coefficients they are () or "
            "('d_mlp',)"
        )
    if "d_mlp" in own.axes and (own.tap != "coefficients" or len(own.axes) > 1):
        raise UserError(
            f"sum {own.name!r} has axes {own.axes}; d_mlp stands alone, with the tap coefficients"
        )
    SUMS[own.name] = own


def all_tables() -> dict[str, tuple[str, ...]]:
    """Every table and its axes behind that of the groups."""
    return {**TABLES, **{name: own.table_axes for name, own in SUMS.items()}}


def is_pooled(table: str) -> bool:
    """Whether a table is kept once, not once per group."""
    return table in SUMS and SUMS[table].is_pooled
