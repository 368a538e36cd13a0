"""Which text is in which row of which step.

With N instances and a global batch of B rows there are N // B steps in an epoch (the rest of a
permutation is left out), and row r of step s (from 1) in epoch e is::

    order_e[(s − 1 − e · (N // B)) · B + r],   order_e = PCG64(seed + e) permutation of N

so it depends neither on the number of workers nor on the micro-batch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ke_ray.errors import DataError

__all__ = ["BatchPlan", "TokenRows"]


class TokenRows(Protocol):
    """A data set of equally long token rows (``ke_ray.data.training_set.PackedDataset``)."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """int64 [len(indices), T] token ids."""
        ...


class BatchPlan:
    """Deterministic order of a data set's rows over the steps of a run.

    Args:
        num_instances: N, rows of the data set.
        global_batch_size: B, rows of a step over all workers.
        seed: of the permutations; epoch e uses ``seed + e``.

    Raises:
        DataError: fewer rows than one batch.
    """

    def __init__(self, num_instances: int, global_batch_size: int, seed: int) -> None:
        if num_instances < global_batch_size:
            raise DataError(
                f"The corpus has {num_instances} rows, one step takes {global_batch_size}; "
                "give more documents, a shorter sequence_length or a smaller global_batch_size."
            )
        self.num_instances = num_instances
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_epoch = num_instances // global_batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def epoch_of(self, step: int) -> int:
        """Epoch, from 0, of ``step``, from 1."""
        return (step - 1) // self.steps_per_epoch

    def instances(self, step: int, first: int, stop: int) -> np.ndarray:
        """int64 [stop − first] data-set indices of the global rows ``first … stop − 1``."""
        epoch = self.epoch_of(step)
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(self.seed + epoch))
            self._order = (epoch, generator.permutation(self.num_instances))
        start = (step - 1 - epoch * self.steps_per_epoch) * self.global_batch_size
        return self._order[1][start + first : start + stop]
