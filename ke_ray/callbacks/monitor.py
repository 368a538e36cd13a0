"""Measurements of a live model every n steps, in any training loop.

The model is trained on as if nobody had looked: modes of modules, gradients, random numbers and
compiled code are as before, hooks are removed whatever happens. Workers that train one model (DDP,
FSDP2) share the forward passes, and have to call the monitor at the same steps.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ke_ray.callbacks.corpus import live_corpus
from ke_ray.callbacks.cost import Cost, plan_cost
from ke_ray.callbacks.folder import RunFolder
from ke_ray.callbacks.passes import live_sums
from ke_ray.checkpoints.find.series import series_label
from ke_ray.core.measures import MEASURE_VERSION, MEASURES, check_measures, interventions_of
from ke_ray.core.sums import OF_LOGITS, SUMS
from ke_ray.errors import ConfigError, KeRayError, UserError, row_error
from ke_ray.evaluation.sharing import Workers, check_alike, together
from ke_ray.models.layout import describe
from ke_ray.models.live import bare_model
from ke_ray.models.memory import free_memory, is_out_of_memory
from ke_ray.models.scoring import check_instances
from ke_ray.models.sharded import is_sharded
from ke_ray.planning.scan_rows import EvaluatedTables, evaluated_tables
from ke_ray.studies.own_measures import origins

log = logging.getLogger(__name__)

_SETTINGS = {"top_k_fraction": 0.01, "dormant_threshold": 0.1}


class Monitor:
    """Measures a live model every n steps, and writes a result folder that ``ke-ray report`` reads.

    ::

        monitor = Monitor(ids, "runs/entropy", tokens_per_step=65_536)
        for step, batch in enumerate(batches, start=1):
            ...  # train
            metrics = monitor(model, step)  # {} between measurements
        monitor.close()

    Call it after every step, on every worker. It returns what to log: nothing between measurements,
    and on the first worker alone.

    Args:
        data: D, small and fixed: token ids [instances, tokens], a file of them, or a ``Corpus``.
        output: the result folder, path or URI.
        measures: names of :data:`ke_ray.core.measures.MEASURES`, or one name.
        every: steps from one measurement to the next; None: as few as ``max_share`` allows.
        tokens_per_step: of training, over all workers; what the forecast of the cost is made from.
        max_share: of training's time that measuring may take by that forecast.
        batch_size: instances per forward pass.
        autocast: form products in this dtype, as mixed-precision training does; None: in the dtype
            of the weights.
        run: a name of the training run; a folder holds one run.

    Attributes:
        cost: the forecast, from ``start`` on.

    Raises:
        DataError: there is no D.
        UserError: an unknown measure; ``every``, ``max_share`` or ``batch_size`` out of range.
    """

    cost: Cost

    def __init__(
        self,
        data: Any,
        output: str | Path,
        *,
        measures: str | Sequence[str] = ("knowledge_entropy",),
        every: int | None = None,
        tokens_per_step: int | None = None,
        max_share: float = 0.01,
        batch_size: int = 4,
        autocast: torch.dtype | None = None,
        run: str | None = None,
    ) -> None:
        for name, value in (("every", every), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1.")
        if not 0 < max_share <= 1:
            raise ConfigError(f"max_share is {max_share}; expected a share of time, such as 0.01.")
        self.corpus = live_corpus(data)
        self.measures = check_measures(measures)
        if interventions_of(self.measures):
            raise ConfigError(
                f"measures is {', '.join(self.measures)}; expected measures that leave the weights "
                "alone while training. Scan saved checkpoints for sensitivity and masking."
            )
        self.output = str(output)
        self.every, self.max_share, self.batch_size = every, max_share, batch_size
        self.tokens_per_step, self.autocast, self.run = tokens_per_step, autocast, run
        self._folder: RunFolder | None = None
        self._is_running = False

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(ending(kind))

    def start(self, model: Any, step: int = 0) -> Cost:
        """Check everything, say what measuring is going to cost, and open the result folder.

        Args:
            model: the live model, as :func:`ke_ray.models.live.bare_model` takes it.
            step: steps that training has made; not 0 where it resumes.

        Raises:
            UnsupportedArchitectureError: the model cannot be measured.
            DataError: D does not fit its vocabulary or its positions.
            ConfigError: the cost is not known, or too high.
            ResultsError: the folder holds another run.
            StorageError: the folder cannot be written.
        """
        bare = bare_model(model)
        self._workers = _workers()
        if self._workers.size > 1:
            alike = (self.corpus.sha256, self.measures, self.every, self.batch_size, step)
            check_alike((), repr(alike).encode(), _device(bare))
        with together(self._workers, _device(bare)):
            layouts = describe(bare)
            check_instances(bare, self.corpus.input_ids, self.corpus.lengths)
            self._check_within_reach(bare)
            self.cost = self._cost(bare)
            if self._workers.rank == 0:
                widths = [layout.d_mlp for layout in layouts]
                config = bare.config
                model_columns = {
                    "series": series_label(
                        config.model_type, len(widths), config.hidden_size, widths
                    ),
                    "n_layers": len(widths),
                }
                self._open(bare, model_columns, step)
                print(f"ke_ray: {self.cost}. Results: {self.output}", file=sys.stderr, flush=True)
        self._is_running = True
        self._last_step = step if step else -1
        self._num_measured = 0
        self._started = time.monotonic()
        self._spent_s, self._has_warned = 0.0, False
        return self.cost

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Measure where it is time to; call it after every step, on every worker.

        Args:
            model: the live model.
            step: steps that training has made; 0 before the first.

        Returns:
            On the first worker, what to log: total and layers of each measure; {} elsewhere,
            between measurements, and where one failed, which the result folder then says.

        Raises:
            UserError: as ``start``, which the first call does, and where the very first
                measurement shows that a measure cannot be had.
        """
        if not self._is_running:
            self.start(model, max(0, step - 1))
        if step <= self._last_step:
            return {}
        self._last_step = step
        return {} if step % self.cost.every else self._measure(bare_model(model), step)

    def close(self, status: str = "finished") -> None:
        """Close the result folder; a call after that opens it again.

        Args:
            status: ``finished``, ``failed`` or ``interrupted``.
        """
        self._is_running = False
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        share = self._share()
        log.info("Measuring took %.2g %% of the time.", 100 * share)
        try:
            folder.close(status, share)
        except (KeRayError, OSError) as error:
            log.warning("'%s' could not be closed: %s", self.output, error)

    def _measure(self, model: Any, step: int) -> dict[str, float]:
        started = self._clock(model)
        try:
            with undisturbed(_device(model), self.autocast):
                sums = live_sums(model, self.corpus, self.measures, self.batch_size, self._workers)
        except Exception as error:
            if isinstance(error, UserError) and not self._num_measured:
                raise  # it will not work later either
            if is_sharded(model):
                raise  # the others are within the pass: they see this process end
            message, out_of_memory = row_error(error), is_out_of_memory(error)
        else:
            self._num_measured += 1
            if self._workers.rank:
                return {}
            message, out_of_memory = "", False
            try:
                result: EvaluatedTables | str = evaluated_tables(sums, self.measures, **_SETTINGS)
            except KeRayError as error:
                message = str(error)
        if out_of_memory:
            free_memory(_device(model))
            message += f" (batch_size is {self.batch_size}; a smaller one needs less memory)"
        if message:
            log.warning("Step %d was not measured, training goes on: %s", step, message)
            result = message
        self._write(step, result)
        seconds = self._clock(model) - started
        self._watch_time(step, seconds)
        if isinstance(result, str):
            return {}
        return {**_metrics(result), "knowledge_entropy/measuring_s": seconds}

    def _write(self, step: int, result: EvaluatedTables | str) -> None:
        if self._folder is None:
            return
        try:
            self._folder.write(step, step * self.cost.tokens_per_step, result)
        except (KeRayError, OSError) as error:
            log.warning("Step %d was not written, training goes on: %s", step, error)

    def _watch_time(self, step: int, seconds: float) -> None:
        if step == 0:  # before the clock of training
            self._started = time.monotonic()
            return
        self._spent_s += seconds
        if self._share() > self.max_share and self._num_measured > 2 and not self._has_warned:
            self._has_warned = True
            log.warning(
                "Measuring takes %.2g %% of the time, more than the %.2g %% forecast from tokens; "
                "a larger every, a smaller D or a larger batch_size make it cheaper.",
                *(100 * self._share(), 100 * self.cost.share),
            )

    def _share(self) -> float:
        return self._spent_s / max(time.monotonic() - self._started, 1e-9)

    def _clock(self, model: Any) -> float:
        device = _device(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else steps that are under way would count
        return time.monotonic()

    def _cost(self, model: Any) -> Cost:
        parameters = list(model.parameters())
        trained = sum(each.numel() for each in parameters if each.requires_grad)
        corpus, size = self.corpus, self._workers.size
        # Workers make equally many passes, the last ones perhaps for less.
        padding = -(-corpus.num_instances // size) * size / corpus.num_instances
        return plan_cost(
            num_tokens=round(corpus.num_tokens * padding),
            tokens_per_step=self.tokens_per_step,
            trained_share=trained / sum(each.numel() for each in parameters),
            every=self.every,
            max_share=self.max_share,
        )

    def _check_within_reach(self, model: Any) -> None:
        if not is_sharded(model):
            return
        beyond = [
            name
            for name in self.measures
            for table in MEASURES[name].tables
            if table in OF_LOGITS or (table in SUMS and SUMS[table].tap == "hidden")
        ]
        if beyond:
            raise ConfigError(
                f"{', '.join(dict.fromkeys(beyond))} cannot be measured while weights are sharded "
                "(FSDP2): the pass is seen within the layers alone. Leave them out, and scan saved "
                "checkpoints for them."
            )

    def _open(self, model: Any, model_columns: dict[str, Any], step: int) -> None:
        corpus, precision = self.corpus, torch.get_float32_matmul_precision()
        identity = {
            "measure_version": MEASURE_VERSION,
            **_SETTINGS,
            "dtype": _name(next(model.parameters()).dtype),
            "autocast": self.autocast and _name(self.autocast),
            **({} if precision == "highest" else {"matmul_precision": precision}),
            "series": model_columns["series"],
            "run": self.run,
            "own_measures": origins(self.measures),
            "corpora": {corpus.name: corpus.sha256},
            "sampling": {corpus.name: corpus.sampling},
            "groups": {corpus.name: corpus.grouping},
        }
        config = {
            "data": {corpus.name: corpus.source},
            "measures": list(self.measures),
            "max_share": self.max_share,
            "batch_size": self.batch_size,
        }
        self._folder = RunFolder(
            self.output,
            corpus,
            self.measures,
            identity=identity,
            config=config,
            cost=asdict(self.cost) | {"forecast_share": self.cost.share},
            model=model_columns,
        )
        self._folder.open(step)


def ending(error: type[BaseException] | None) -> str:
    """The status of a run that ended with this exception, or without."""
    if error is None:
        return "finished"
    return "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"


@contextmanager
def undisturbed(device: torch.device, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Random numbers are drawn aside, and casts of weights are not kept for training's autocast."""
    own, arrays = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(
                device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False
            ),
        ):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)


def _metrics(tables: EvaluatedTables) -> dict[str, float]:
    """Names for loggers, such as ``knowledge_entropy/gini/layer_03_fraction``."""
    metrics = {}
    for row in tables.rows.to_pylist():
        part = "total" if row["layer"] is None else f"layer_{row['layer']:02d}"
        below = "" if row["measure"] == "knowledge_entropy" else f"/{row['measure']}"
        if row["value"] is not None:
            metrics[f"knowledge_entropy{below}/{part}_{row['unit']}"] = row["value"]
    return metrics


def _workers() -> Workers:
    if dist.is_available() and dist.is_initialized():
        return Workers(dist.get_rank(), dist.get_world_size())
    return Workers()


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
