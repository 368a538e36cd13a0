"""The scorer: an actor that loads checkpoints and turns work items into rows or partial sums.

Ray Data calls an actor for two items at a time, on two threads, or for more where ``prefetch`` says
so. One lock is held while loading and another while scoring, so the next checkpoint is fetched and
loaded while this one is scored; those after it are fetched, and loaded when a model is done.
The monitor, which outlives the actors, deals the items: what is next, for as many scorers as there
are. Whatever goes wrong with an item becomes a row with its error; an item that keeps killing its
actor is given up after ``MAX_ATTEMPTS`` by the monitor's count.

    input    one row    ``ticket`` (a number, with which the scorer asks for an item)
    output   one row for each corpus of the item, columns of ``scan_messages.OUTPUT_SCHEMA``
    resources   ``num_cpus`` or ``num_gpus`` per actor, chosen by the scan; a scorer uses a GPU
                only where Ray granted it one
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.series import series_label
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core.measures import needs_usage
from ke_ray.engine.cluster.placement import granted_device, in_driver
from ke_ray.errors import DeviceMemoryError, KeRayError, StoreOutageError
from ke_ray.models.architectures import use_description
from ke_ray.models.loading import load_model
from ke_ray.planning.scan_dealing import Deal
from ke_ray.planning.scan_items import RowRange, WorkItem
from ke_ray.planning.scan_messages import (
    OUTAGE,
    ScorerSettings,
    evaluated_columns,
    failed_table,
    output_table,
    save_tensors,
)
from ke_ray.studies.own_measures import use_own_measure

if TYPE_CHECKING:
    import torch

    from ke_ray.core.statistics import GroupSums
    from ke_ray.resuscitation.apply import ResuscitationRecord

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
_MAX_MODELS = 2  # one is scored, one is loaded
_REPORT_EVERY_S = 0.5
_ASK_EVERY_S = 0.5
_LOOK_EVERY_S = 2.0
#: For Ray's own way to end an actor, once its scan is over.
_GRACE_S = 5.0


@dataclass
class _Loaded:
    """A model that one or two items use."""

    model: Any
    fetch_s: float
    load_s: float
    sha256: Future[str]
    resuscitation: ResuscitationRecord | None = None


@dataclass
class _Slot:
    ready: Future[_Loaded] = field(default_factory=Future)
    users: int = 0


class CheckpointScorer:
    """One scorer: a callable class for ``Dataset.map_batches``.

    Args:
        settings: the same for all.
        checkpoints: the listing; work items name a checkpoint by its index.
        corpora: name → object reference of (input_ids, lengths).
        monitor: handle of the :class:`~ke_ray.planning.scan_monitor.ScanMonitor`.
    """

    def __init__(
        self,
        settings: ScorerSettings,
        checkpoints: Sequence[CheckpointRef],
        corpora: dict[str, Any],
        monitor: Any,
    ) -> None:
        # These imports leave no garbage, and to look for it would take a sixth of their time.
        gc.disable()
        try:
            import ray
            import torch
            import transformers.modeling_utils  # noqa: F401  # that of every model, loaded here
        finally:
            gc.enable()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.set_float32_matmul_precision(settings.matmul_precision)
        use_description(settings.architecture)
        for own in settings.own_measures:
            use_own_measure(own)
        self._settings = settings
        self._batch_size = settings.batch_size  # less, once memory has run out
        self._checkpoints = checkpoints
        self._monitor = monitor
        self._name = ray.get_runtime_context().get_actor_id() or "driver"
        if not in_driver():
            ray.get(monitor.scored.remote())  # an actor that fails here is not restarted again
            threading.Thread(target=_end_after, args=(monitor,), daemon=True).start()
        self._corpora = {name: ray.get(ref) for name, ref in corpora.items()}
        self._device, problem = granted_device()
        self._refusal = None
        if problem is not None and settings.device == "cuda":
            self._refusal = f"{problem}, and the study's device is cuda; nothing was scored here."
        elif problem is not None:
            monitor.warn.remote(f"{problem}: this scorer, and others like it, scores on CPUs.")
        self._store = Store(settings.cache_dir, settings.cache_bytes)
        self._slots: dict[int, _Slot] = {}
        self._guard = threading.Condition()  # of the slots
        self._load_lock = threading.Lock()
        self._score_lock = threading.Lock()
        self._item_lock = _SharedLock()
        self._hasher = ThreadPoolExecutor(1, "weights-hash")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Score the item that the monitor deals for the ticket of a one-row table."""
        import ray

        ticket = batch["ticket"][0].as_py()
        while True:
            deal, is_over = ray.get(self._monitor.take.remote(ticket, self._name))
            if deal is not None:
                break
            if is_over:
                return output_table([])
            time.sleep(_ASK_EVERY_S)  # one that is lost elsewhere may come back
        # An item that was lost with its actor runs alone the next time, so that an item which
        # kills its actor takes no neighbour with it.
        with self._item_lock.held(exclusive=deal.losses > 0):
            table = self._answer(deal)
        ray.get(self._monitor.end.remote(deal.item.index))
        return table

    def _answer(self, deal: Deal) -> pa.Table:
        import ray

        item, ref = deal.item, self._checkpoints[deal.item.checkpoint]
        if self._refusal is not None:
            return failed_table(item, f"'{ref.label}': {self._refusal}")
        if deal.losses >= MAX_ATTEMPTS:
            return failed_table(
                item,
                f"'{ref.label}' ended the process that scored it {deal.losses} times "
                "(most likely it does not fit into memory); given up.",
            )
        ray.get(self._monitor.begin.remote(item.index))
        try:
            return self._score(item, ref)
        except StoreOutageError as error:  # it says nothing about the checkpoint
            return failed_table(item, str(error), OUTAGE)
        except KeRayError as error:
            text = str(error)
            return failed_table(item, text if ref.label in text else f"'{ref.label}': {text}")
        except Exception as error:
            log.exception("Scoring '%s' failed", ref.label)
            return failed_table(item, f"'{ref.label}': {type(error).__name__}: {error}")

    def _score(self, item: WorkItem, ref: CheckpointRef) -> pa.Table:
        outputs = []
        with self._model(item.checkpoint, ref) as loaded:
            waiting = time.monotonic()
            with self._score_lock:
                started = time.monotonic()
                report = self._reporter(item.index)
                sums = [self._sum(loaded.model, rows, report) for rows in item.ranges]
                ended = time.monotonic()
            scored = sum(part.total_tokens for part in sums)
            self._monitor.report.remote(item.index, scored, ended - started)
            for rows, part in zip(item.ranges, sums, strict=True):
                outputs.append(self._output(item, ref, rows, part))
            model = {"weights_sha256": loaded.sha256.result(), **_identity(loaded.model)}
        for output in outputs:
            output |= model
        timings = {
            "fetch_s": loaded.fetch_s,
            "load_s": loaded.load_s,
            "score_s": ended - started,
            "wait_s": started - waiting,
        }
        record = loaded.resuscitation and json.dumps(asdict(loaded.resuscitation))
        outputs[0] |= {**timings, "resuscitation": record}  # once per item
        return output_table(outputs)

    def _sum(self, model: Any, rows: RowRange, report: Any) -> GroupSums:
        from ke_ray.models.scoring import mean_usage, score_within_memory

        input_ids, lengths = self._corpora[rows.work.corpus]
        usage, num_changed = None, self._settings.intervention_instances
        if not rows.is_whole and needs_usage(rows.work.measures):
            # Of all of D, whichever part of it is scored here.
            usage = mean_usage(
                model, input_ids, lengths, num_instances=num_changed, batch_size=self._batch_size
            )
        sums, self._batch_size = score_within_memory(
            model,
            input_ids[rows.start : rows.stop],
            lengths[rows.start : rows.stop],
            measures=rows.work.measures,
            num_instances=rows.work.num_instances,
            group_sizes=rows.work.group_sizes,
            first_instance=rows.start,
            batch_size=self._batch_size,
            on_batch=report,
            intervention_instances=num_changed,
            noise_seeds=self._settings.noise_seeds,
            usage=usage,
        )
        return sums

    def _output(
        self, item: WorkItem, ref: CheckpointRef, rows: RowRange, sums: GroupSums
    ) -> dict[str, Any]:
        output: dict[str, Any] = {
            "item": item.index,
            "checkpoint": item.checkpoint,
            "corpus": rows.work.corpus,
            "start": rows.start,
            "stop": rows.stop,
            "status": "ok",
            "num_instances": sums.total_instances,
            "num_tokens": sums.total_tokens,
        }
        if not rows.is_whole:
            return {**output, "sums": save_tensors(sums.to_tensors())}
        try:
            return {**output, **evaluated_columns(sums, rows.work.measures, self._settings)}
        except KeRayError as error:
            return {**output, "status": "failed", "error": f"'{ref.label}': {error}"}

    @contextmanager
    def _model(self, index: int, ref: CheckpointRef) -> Iterator[_Loaded]:
        """The model of a checkpoint, loaded once for all items that use it at the same time."""
        with self._guard:
            slot = self._slots.get(index)
            is_owner = slot is None
            if slot is None:
                slot = self._slots[index] = _Slot()
            slot.users += 1
        try:
            if is_owner:
                try:
                    with self._fetched(ref) as fetch_s, self._load_lock:
                        with self._guard:
                            self._guard.wait_for(lambda: self._num_others(index) < _MAX_MODELS)
                        self._drop_idle(index)
                        loaded = replace(self._load_fitting(index, ref), fetch_s=fetch_s)
                        slot.ready.set_result(loaded)
                except BaseException as error:
                    slot.ready.set_exception(error)
            loaded = slot.ready.result()
            # An item that finds it loaded has waited for nothing.
            yield loaded if is_owner else replace(loaded, fetch_s=0.0, load_s=0.0)
        finally:
            with self._guard:
                slot.users -= 1
                self._guard.notify_all()
                if slot.ready.exception() is not None and not slot.users:
                    self._slots.pop(index, None)

    @contextmanager
    def _fetched(self, ref: CheckpointRef) -> Iterator[float]:
        """A checkpoint on this node for the block; yields the seconds that it took."""
        started = time.monotonic()
        self._store.fetch(ref)
        try:
            yield time.monotonic() - started
        finally:
            self._store.release(ref)

    def _drop_idle(self, needed: int) -> None:
        with self._guard:
            for index in [i for i, s in self._slots.items() if not s.users and i != needed]:
                del self._slots[index]

    def _load_fitting(self, index: int, ref: CheckpointRef) -> _Loaded:
        """Load a model; where it does not fit beside the one that is scored, after that one."""
        try:
            return self._load(ref)
        except DeviceMemoryError as error:
            with self._guard:
                if not self._num_others(index):
                    raise
            log.warning("%s It is loaded again when the model beside it is done.", error)
        with self._guard:
            self._guard.wait_for(lambda: not self._num_others(index))
        self._drop_idle(index)
        gc.collect()
        return self._load(ref)

    def _num_others(self, index: int) -> int:
        """Loaded models in use other than that of ``index``; asked under the guard."""
        return sum(
            slot.users > 0 and slot.ready.done() and slot.ready.exception() is None
            for other, slot in self._slots.items()
            if other != index
        )

    def _load(self, ref: CheckpointRef) -> _Loaded:
        import torch

        from ke_ray.resuscitation.apply import resuscitate
        from ke_ray.resuscitation.coefficients import coefficients_of

        started = time.monotonic()
        folder = self._store.fetch(ref)  # it is here; one more lease, until it is hashed
        # Hashed on a thread of its own while the model loads and scores; fetched files stay
        # until both loading and hashing are done with them.
        digest = self._hasher.submit(weights_sha256, folder)
        try:
            dtype: torch.dtype = getattr(torch, self._settings.dtype)
            model = load_model(folder, dtype=dtype, device=self._device)
            record = None
            if (settings := self._settings.resuscitation) is not None:
                coefficients = coefficients_of(
                    settings, digest.result, ref.name, lambda: self._measured(model)
                )
                record = resuscitate(model, settings, coefficients)
        finally:
            digest.add_done_callback(lambda _: self._store.release(ref))
        return _Loaded(model, 0.0, time.monotonic() - started, digest, record)

    def _measured(self, model: Any) -> torch.Tensor:
        """C̄ of the model as it is, on the whole of the scan's first corpus."""
        from ke_ray.models.scoring import score_within_memory

        input_ids, lengths = next(iter(self._corpora.values()))
        with self._score_lock:  # the precision of products is the process's, not a thread's
            sums, self._batch_size = score_within_memory(
                model,
                input_ids,
                lengths,
                measures=("knowledge_entropy",),
                num_instances=len(input_ids),
                batch_size=self._batch_size,
            )
        return sums.mean("coefficients")

    def _reporter(self, item: int) -> Any:
        total = 0
        last = started = time.monotonic()

        def report(num_tokens: int) -> None:
            nonlocal total, last
            total += num_tokens
            now = time.monotonic()
            if now - last >= _REPORT_EVERY_S:
                last = now
                self._monitor.report.remote(item, total, now - started)

        return report


def _end_after(monitor: Any) -> None:
    """End this process when its scan is over, which the death of its monitor says.

    Ray ends an actor once nobody holds its handle. One that was restarting when its scan ended has
    been seen to stay, and would keep its CPUs or GPU for as long as the driver's session lasts.
    """
    import ray

    while True:
        time.sleep(_LOOK_EVERY_S)
        try:
            ray.get(monitor.scored.remote())
        except ray.exceptions.ActorDiedError:
            break
        except ray.exceptions.RayError:  # a network that is away for a moment
            continue
    time.sleep(_GRACE_S)
    os._exit(0)


def _identity(model: Any) -> dict[str, Any]:
    """What tells a model's series from others: architecture and sizes, from the model itself."""
    from ke_ray.models.layout import describe

    config, layers = model.config, describe(model)
    widths = [layer.d_mlp for layer in layers]
    series = series_label(config.model_type, len(layers), config.hidden_size, widths)
    return {"series": series, "n_layers": len(layers)}


class _SharedLock:
    """A lock that any number of threads share, or that one thread has exclusively."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_holders = 0
        self._num_waiting = 0  # for it alone
        self._is_exclusive = False

    @contextmanager
    def held(self, *, exclusive: bool) -> Iterator[None]:
        with self._condition:
            self._num_waiting += exclusive  # is let in before those who share
            self._condition.wait_for(
                lambda: (
                    not self._is_exclusive
                    and (self._num_holders == 0 if exclusive else not self._num_waiting)
                )
            )
            self._num_waiting -= exclusive
            self._num_holders += 1
            self._is_exclusive = exclusive
        try:
            yield
        finally:
            with self._condition:
                self._num_holders -= 1
                self._is_exclusive = False
                self._condition.notify_all()
