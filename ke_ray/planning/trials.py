"""A sweep's points and trials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.runs import RunSpec, read_row


@dataclass(frozen=True)
class Point:
    """One choice of the swept keys: dotted key → value."""

    number: int
    params: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A point with one seed, as the continual study that it is.

    Attributes:
        study: seeds and output set; run as ``spec``.
        params: the values of the swept keys in it, for its row.
    """

    point: Point
    study: ContinualStudy
    spec: RunSpec
    params: dict[str, Any]

    @property
    def trial_id(self) -> str:
        """Names its folder, its row and its MLflow run."""
        return self.spec.name

    def row(self) -> dict[str, Any] | None:
        """Its row where it ended (``ok``, ``failed`` or ``stopped``)."""
        return read_row(self.study, self.spec)

    @property
    def is_done(self) -> bool:
        """Whether another command need not run it (a failed one is tried again)."""
        row = self.row()
        return row is not None and row["status"] != "failed"
