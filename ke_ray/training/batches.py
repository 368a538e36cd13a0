"""Order of the corpus over the rows and steps of a run.

With N instances and a global batch of B rows there are N // B steps in an epoch (the rest of a
permutation is skipped), and row r of step s (from 1) in epoch e is the data set's instance ::

    order(e)[(s − 1 − e · (N // B)) · B + r]

so it depends neither on the number of workers nor on the micro-batch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ke_ray.errors import DataError


class TokenRows(Protocol):
    """A data set of equally long token rows (``ke_ray.data.training_set.PackedDataset``)."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """int64 [len(indices), T] token ids."""
        ...

    def order(self, epoch: int) -> np.ndarray:
        """int64 [N]: the permutation in which epoch 0, 1, … visits the instances."""
        ...


class BatchPlan:
    """Deterministic order of a data set's rows over the steps of a run.

    Args:
        data: N instances.
        global_batch_size: B, rows of a step over all workers.

    Raises:
        DataError: fewer rows than one batch.
    """

    def __init__(self, data: TokenRows, global_batch_size: int) -> None:
        if len(data) < global_batch_size:
            raise DataError(
                f"The corpus has {len(data)} rows, one step takes {global_batch_size}; "
                "give more documents, a shorter sequence_length or a smaller global_batch_size."
            )
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(data) // global_batch_size
        self._data = data
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def epoch_of(self, step: int) -> int:
        """Epoch, from 0, of ``step``, from 1."""
        return (step - 1) // self.steps_per_epoch

    def instances(self, step: int, first: int, stop: int) -> np.ndarray:
        """int64 [stop − first] data-set indices of the global rows ``first … stop − 1``."""
        epoch = self.epoch_of(step)
        if self._order[0] != epoch:
            self._order = (epoch, self._data.order(epoch))
        start = (step - 1 - epoch * self.steps_per_epoch) * self.global_batch_size
        return self._order[1][start + first : start + stop]
