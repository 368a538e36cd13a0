"""A column of a result table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Column:
    """A column of a result table.

    Attributes:
        name: in the file.
        type: pyarrow's name of the type.
        doc: its meaning, for ``docs/results.md``.
        unit: of its values; a ``fraction`` is displayed in per cent.
        title: in tables and on axes; empty where the name is displayed.
        direction: whether more or less is better; None: neither.
        needs: the group of a continual study without which the column is empty. A column with a
            direction and a group is an objective of sweeps.
    """

    name: str
    type: str
    doc: str = ""
    unit: str = ""
    title: str = ""
    direction: Direction | None = None
    needs: str | None = None

    @property
    def factor(self) -> float:
        """Factor from the stored to the displayed value."""
        return 100.0 if self.unit == "fraction" else 1.0

    @property
    def shown_unit(self) -> str:
        """The unit of the displayed value."""
        return "%" if self.unit == "fraction" else self.unit
