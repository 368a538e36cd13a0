"""The one training loop: pretraining, continual learning and sweep trials run it.

Step s = 1 … S makes the s-th update; "after step s" the model has seen s batches, and step 0 is
the start. One step, on a worker that holds rows [first, stop) of the B global rows of T tokens::

    loss = Σ over all rows and targets of −ln p(target) / (B · (T − 1))

Each worker sums over its micro-batches, divides by the *global* number of targets, and gradients
are added over workers, so that neither the micro-batch nor the number of workers enters the
result beyond rounding. Losses stay on the device and are read every ``log_every`` steps (and before
anything is saved), so that a GPU never waits for the host in between.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from ke_ray.errors import NonFiniteLossError
from ke_ray.studies.training import TrainingSettings
from ke_ray.training.batches import BatchPlan, TokenRows
from ke_ray.training.checkpoint import States, TrainingState
from ke_ray.training.loss import row_losses
from ke_ray.training.optimizer import build_optimizer, clip_gradients
from ke_ray.training.parallel import (
    Worker,
    accumulate,
    all_gather_objects,
    all_reduce_sum,
    barrier,
    decoder_layers,
    unwrap,
    wrap_model,
)
from ke_ray.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class StepRecord:
    """One row of ``train.parquet``. ``loss`` in nats per token, ``elapsed_s`` over all restarts."""

    step: int
    num_tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Progress:
    """State of a run for live displays."""

    record: StepRecord
    num_steps: int
    time_left_s: float

    def __str__(self) -> str:
        row = self.record
        return f"step {row.step}/{self.num_steps}, loss {row.loss:.3f}, lr {row.learning_rate:.2e}"


@dataclass
class Hooks:
    """Callbacks of the loop; all optional, and called on every worker unless said otherwise.

    Attributes:
        transform: ``(step, first_row, rows int64 [n, T]) -> rows``: changes the batch of a step,
            given the global index of the first of its rows.
        after_step: ``(step, model, state)``: called at the steps of ``at_steps`` with the bare
            model, in training mode; its ``state.record`` rows survive a resume.
        at_steps: the steps of ``after_step``; 0 means before the first update.
        on_progress: called on the main worker whenever losses were read.
    """

    transform: Callable[[int, int, np.ndarray], np.ndarray] | None = None
    after_step: Callable[[int, nn.Module, TrainingState], None] | None = None
    at_steps: frozenset[int] = frozenset()
    on_progress: Callable[[Progress], None] | None = None


@dataclass
class _Pending:
    """Losses of steps that were not read yet; tensors stay on the device."""

    steps: list[int] = field(default_factory=list)
    row_sums: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    started: float = 0.0


def train(
    model: nn.Module,
    data: TokenRows,
    settings: TrainingSettings,
    *,
    num_steps: int,
    worker: Worker | None = None,
    hooks: Hooks | None = None,
    state_uri: str | None = None,
    identity: str = "",
) -> TrainingState:
    """Train ``model`` in place for ``num_steps`` updates.

    Args:
        model: a causal language model in float32, on ``worker.device``.
        data: the rows; row r of step s as :class:`BatchPlan` says.
        settings: batch sizes, optimizer, schedule, precision, …
        worker: this process among the workers; default: alone, on the CPU.
        state_uri: where training states are saved (every ``settings.state_interval`` steps, every
            ``settings.save_every_minutes`` and at the end) and looked for: a run that was killed
            resumes from the newest.
        identity: fingerprint of the run, so that it does not resume from another one's state.

    Returns:
        The final state; ``records["train"]`` holds a row per step, fields of :class:`StepRecord`.

    Raises:
        DataError: the data set has fewer rows than one batch.
        NonFiniteLossError: names step and rows; earlier states are kept.
        StorageError: a training state cannot be written.
    """
    worker, hooks = worker or Worker(), hooks or Hooks()
    if state_uri is None:
        return _train(model, data, settings, num_steps, worker, hooks, None)
    with closing(States(state_uri, worker, identity=identity)) as states:
        state = _train(model, data, settings, num_steps, worker, hooks, states)
        states.wait()
        barrier(worker)  # before one of them ends the group through which the others heard of it
    return state


def _train(
    model: nn.Module,
    data: TokenRows,
    settings: TrainingSettings,
    num_steps: int,
    worker: Worker,
    hooks: Hooks,
    states: States | None,
) -> TrainingState:
    plan = BatchPlan(data, settings.global_batch_size)
    local = settings.global_batch_size // worker.world_size
    first_row = worker.rank * local
    micro = min(settings.rows_per_forward, local)
    _prepare(model, settings)
    wrapped = wrap_model(model, worker, strategy=settings.strategy, precision=settings.precision)
    optimizer = build_optimizer(unwrap(wrapped), settings.optimizer)
    state = None if states is None else states.load(wrapped, optimizer)
    resumed = state is not None
    state = state or TrainingState()
    started = time.perf_counter() - state.elapsed_s
    interval = settings.state_interval(num_steps)
    every_s = 60 * settings.save_every_minutes if settings.save_every_minutes else None
    log_every = settings.log_every or (10 if worker.device.startswith("cuda") else 1)

    if hooks.after_step and 0 in hooks.at_steps and not resumed:
        hooks.after_step(0, unwrap(wrapped), state)
    pending = _Pending(started=time.perf_counter())
    for step in range(state.step + 1, num_steps + 1):
        rows = data.rows(plan.instances(step, first_row, first_row + local))
        if hooks.transform is not None:
            rows = hooks.transform(step, first_row, rows)
        factor = learning_rate_factor(settings.schedule, step, num_steps)
        rate = settings.optimizer.learning_rate * factor
        row_sums = _gradients(wrapped, rows, settings, worker, micro)
        norm = clip_gradients(wrapped, settings.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step = step
        pending.steps.append(step)
        pending.row_sums.append(row_sums)
        pending.norms.append(norm.detach())
        pending.rates.append(rate)

        acts = hooks.after_step is not None and step in hooks.at_steps
        saves = states is not None and (step % interval == 0 or step == num_steps)
        if step % log_every == 0 or step == num_steps or acts or saves:
            # The main worker's clock counts, for all workers save together.
            due = states is not None and worker.is_main and states.is_due(every_s)
            saves |= _read_losses(
                pending, state, settings, plan, worker, started, rows.shape[1], first_row, due
            )
            if hooks.on_progress and worker.is_main:
                record = StepRecord(**state.records["train"][-1])
                done = len(state.records["train"])
                left = record.elapsed_s / done * (num_steps - step)
                hooks.on_progress(Progress(record, num_steps, left))
        if acts and hooks.after_step is not None:
            hooks.after_step(step, unwrap(wrapped), state)
        if saves and states is not None:
            state.elapsed_s = time.perf_counter() - started
            states.save(state, wrapped, optimizer)
        if acts or saves:
            pending.started = time.perf_counter()
    state.elapsed_s = time.perf_counter() - started
    return state


def _prepare(model: nn.Module, settings: TrainingSettings) -> None:
    model.train()
    model.requires_grad_(True)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if settings.compile:
        for layer in decoder_layers(model):
            layer.compile()


def _gradients(
    model: nn.Module, rows: np.ndarray, settings: TrainingSettings, worker: Worker, micro: int
) -> torch.Tensor:
    """Add this worker's part of the gradients; return loss sums of its rows, float32 [n]."""
    ids = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
    device_type = torch.device(worker.device).type
    if device_type == "cuda":
        ids = ids.pin_memory().to(worker.device, non_blocking=True)
    # Wrappers average gradients over workers, hence the factor world_size.
    scale = worker.world_size / (settings.global_batch_size * (ids.shape[1] - 1))
    sums = []
    for start in range(0, len(ids), micro):
        with accumulate(model, last=start + micro >= len(ids)):
            autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
            if settings.precision == "bfloat16":
                autocast = torch.autocast(device_type, dtype=torch.bfloat16)
            with autocast:
                losses = row_losses(model, ids[start : start + micro])
            (losses.sum() * scale).backward()
        sums.append(losses.detach())
    return torch.cat(sums)


def _read_losses(
    pending: _Pending,
    state: TrainingState,
    settings: TrainingSettings,
    plan: BatchPlan,
    worker: Worker,
    started: float,
    sequence_length: int,
    first_row: int,
    flag: bool,
) -> bool:
    """Turn pending losses into records, with one reduction over the workers.

    Returns:
        Whether ``flag`` is true on one of the workers.

    Raises:
        NonFiniteLossError: a loss or a gradient norm is not finite.
    """
    own = [sums.sum() for sums in pending.row_sums]
    totals = torch.stack([*own, own[0].new_tensor(float(flag))])
    totals = all_reduce_sum(totals, worker)
    numbers = torch.cat([totals, torch.stack(pending.norms)]).tolist()  # waits for the device, once
    any_flag = numbers.pop(len(own))
    losses = zip(pending.steps, numbers[: len(own)], numbers[len(own) :], strict=True)
    now = time.perf_counter()
    tokens = settings.global_batch_size * sequence_length
    rate = tokens * len(pending.steps) / max(now - pending.started, 1e-9)
    for i, (step, total, norm) in enumerate(losses):
        loss = total / (settings.global_batch_size * (sequence_length - 1))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            _refuse_losses(pending, i, loss, norm, plan, worker, first_row)
        state.num_tokens += tokens
        state.elapsed_s = now - started
        record = StepRecord(
            step, state.num_tokens, loss, pending.rates[i], norm, rate, state.elapsed_s
        )
        state.record("train", asdict(record))
    pending.steps.clear()
    pending.row_sums.clear()
    pending.norms.clear()
    pending.rates.clear()
    pending.started = now
    return bool(any_flag)


def _refuse_losses(
    pending: _Pending,
    i: int,
    loss: float,
    norm: float,
    plan: BatchPlan,
    worker: Worker,
    first_row: int,
) -> None:
    step = pending.steps[i]
    own = (~torch.isfinite(pending.row_sums[i])).nonzero().flatten().tolist()
    bad: Sequence[int] = sorted(
        r for part in all_gather_objects([first_row + r for r in own], worker) for r in part
    )
    culprits = "no row by itself: the gradients overflowed"
    if bad:
        instances = plan.instances(step, 0, plan.global_batch_size)[list(bad[:8])].tolist()
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        culprits = f"global rows {list(bad[:8])}{more} (corpus instances {instances})"
    raise NonFiniteLossError(
        f"The loss is {loss} and the gradient norm {norm} at step {step}, batch {step - 1}: "
        f"{culprits}. The last saved state is kept; lower the learning rate, or check those rows."
    )
