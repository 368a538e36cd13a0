"""Iterating over the checkpoints of a series as models in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.errors import UserError
from ke_ray.models.loading import load_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class SeriesCheckpoint:
    """A checkpoint in its turn of a loop over a :class:`Series`.

    Attributes:
        ref: what the listing says of it.
    """

    def __init__(
        self,
        ref: CheckpointRef,
        folder: Future[str],
        dtype: torch.dtype | None,
        device: str | torch.device,
    ) -> None:
        self.ref = ref
        self._folder, self._dtype, self._device = folder, dtype, device
        self._is_over = False

    def __repr__(self) -> str:
        return f"<SeriesCheckpoint {self.name}>"

    @property
    def name(self) -> str:
        """Unique in the series."""
        return self.ref.name

    @property
    def step(self) -> int | None:
        """Of pretraining; None where no name gives it."""
        return self.ref.step

    @property
    def tokens(self) -> int | None:
        """Pretraining tokens so far, over all stages; None where they are not known."""
        return self.ref.tokens

    @property
    def folder(self) -> Path:
        """The checkpoint's local folder, which may go once the loop has gone on.

        Raises:
            CheckpointError: it cannot be fetched.
            StorageError: it does not fit the cache's budget or the disk.
        """
        self._check_turn()
        return Path(self._folder.result())

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model in evaluation mode, loaded when it is first asked for.

        Raises:
            CheckpointError, StorageError: as ``folder``, or it is broken; the message says how.
            UnsupportedArchitectureError: ke_ray does not know this architecture.
        """
        return load_model(self.folder, dtype=self._dtype, device=self._device)

    def end(self) -> None:
        """Drop the model; the loop does so before the next checkpoint's turn."""
        self._is_over = True
        self.__dict__.pop("model", None)

    def _check_turn(self) -> None:
        if self._is_over:
            raise UserError(
                f"'{self.name}' is no longer the current checkpoint of the loop, and its files may "
                "have been removed. Use `model` and `folder` before the next iteration."
            )


class Series:
    """Listed checkpoints; a loop over them fetches ahead and frees behind."""

    def __init__(
        self,
        checkpoints: list[CheckpointRef],
        *,
        dtype: torch.dtype | None,
        device: str | torch.device,
        prefetch: int,
        cache_dir: str | None,
        cache_bytes: int | None,
    ) -> None:
        self.checkpoints = tuple(checkpoints)
        self._dtype, self._device, self._prefetch = dtype, device, prefetch
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[SeriesCheckpoint]:
        stopped = threading.Event()
        store = Store(self._cache_dir, self._cache_bytes)
        pool = ThreadPoolExecutor(1, thread_name_prefix="ke_ray-series")
        waiting = iter(self.checkpoints)
        ahead: deque[SeriesCheckpoint] = deque()

        def fetch_next() -> None:
            ref = next(waiting, None)
            if ref is not None:
                folder = pool.submit(store.fetch, ref, should_stop=stopped.is_set)
                ahead.append(SeriesCheckpoint(ref, folder, self._dtype, self._device))

        try:
            for _ in range(self._prefetch + 1):
                fetch_next()
            while ahead:
                checkpoint = ahead.popleft()
                yield checkpoint
                checkpoint.end()
                # Given back before the next is waited for, which may need its room.
                checkpoint._folder.add_done_callback(partial(_release, store, checkpoint.ref))
                fetch_next()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            store.close()


def _release(store: Store, ref: CheckpointRef, fetched: Future[str]) -> None:
    if not fetched.cancelled() and fetched.exception() is None:
        store.release(ref)


def series(
    spec: str,
    *,
    revisions: str | None = None,
    steps: str | None = None,
    every: int | None = None,
    limit: int | None = None,
    step_pattern: str | None = None,
    tokens_per_step: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    prefetch: int = 1,
    cache_dir: str | None = None,
    cache_bytes: int | None = None,
) -> Series:
    """Iterate over the checkpoints that a SPEC names.

    ::

        for checkpoint in ke_ray.series("EleutherAI/pythia-160m", steps="0:143000", every=10):
            print(checkpoint.step, checkpoint.model.num_parameters())

    A checkpoint that cannot be fetched or loaded says so where its ``folder`` or ``model`` is asked
    for; a loop that catches the error goes on with the others.

    Args:
        spec, revisions, steps, every, limit, step_pattern, tokens_per_step: see
            :func:`ke_ray.checkpoints.find.catalog.find_checkpoints`.
        dtype: of all parameters; float32 by default, whatever the files store.
        device: where models go.
        prefetch: checkpoints that are fetched while one is in use.
        cache_dir: for fetched files; default: ``$KE_RAY_CACHE``, else ``~/.cache/ke_ray``.
        cache_bytes: disk budget of the cache: the oldest checkpoints that nobody uses go first.

    Raises:
        CheckpointSpecError: the spec is malformed, names nothing, or cannot be reached.
        UserError: a negative ``prefetch``.
    """
    if prefetch < 0:
        raise UserError(f"prefetch is {prefetch}; give the number of checkpoints, 0 or more.")
    checkpoints = list_checkpoints(
        spec,
        revisions=revisions,
        steps=steps,
        every=every,
        limit=limit,
        step_pattern=step_pattern,
        tokens_per_step=tokens_per_step,
    )
    return Series(
        checkpoints,
        dtype=dtype,
        device=device,
        prefetch=prefetch,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
