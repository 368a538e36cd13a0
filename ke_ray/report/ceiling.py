"""The bound of knowledge entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """Largest possible knowledge entropy, Σ ln(d_mlp) nats over the layers.

    Attributes:
        widths: (number of layers, their d_mlp), for every d_mlp that occurs.
    """

    widths: tuple[tuple[int, int], ...]

    @property
    def nats(self) -> float:
        return sum(n_layers * math.log(d_mlp) for n_layers, d_mlp in self.widths)

    def __str__(self) -> str:
        terms = " + ".join(f"{n_layers}·ln {d_mlp}" for n_layers, d_mlp in self.widths)
        return f"ceiling {terms} = {self.nats:.4g} nats"
