"""Training states, from which a killed run resumes as if it had not been killed.

A state is a folder ``step<NNNNNNNN>`` under any storage URI::

    shard-<NNNNN>.safetensors   one per worker (``state_files``): its part of the parameters and
                                buffers by name, of "<parameter>::<moment>", and its random
                                generators "rank<r>.cpu" and "rank<r>.cuda"
    records.json                rows recorded so far (losses, probes, …)
    state.json                  step, data position, identity, sizes of the files; written last

``state.json`` makes a state valid: a folder without it, or whose files have other sizes, was left
incomplete by a kill and is passed over. What workers replicate, one of them writes. Any number of
workers reads a state, each its own part. On one CPU worker a resumed run equals the undisturbed one
bit by bit. No pickle is read or written. (Until version 1, one file each held all parameters, all
moments and all generators, under the same names; such states are read, too.)

A step waits only for a copy in host memory (on GPUs up to twice the size: pinned memory comes in
powers of two, and is kept). ``torch.distributed.checkpoint`` writes it in a thread,
whose messages go through a gloo group of their own: neither training's messages nor a GPU wait.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ke_ray import storage
from ke_ray.checkpoints.formats.shards import GENERATOR
from ke_ray.errors import KeRayError, StorageError, TrainingError
from ke_ray.training.parallel import Worker, all_gather_objects, named_tensors, unwrap
from ke_ray.training.state_files import ShardReader, ShardWriter

STATE_VERSION = 2
_log = logging.getLogger(__name__)
# One worker needs no process group; torch would say so at each save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


@dataclass
class TrainingState:
    """Progress and records of a run, apart from its tensors."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    #: table name → rows (plain numbers, texts and None)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def record(self, table: str, row: dict[str, Any]) -> None:
        """Append a row, which is saved with the next state."""
        self.records.setdefault(table, []).append(row)


class States:
    """The training states of one run: the newest is loaded, others are saved in the background.

    Make it, call its methods and close it on every worker.

    Args:
        uri: folder of the states.
        identity: fingerprint of the run; another run's states are refused.
        keep: how many states to keep; older ones are removed once a newer one is complete.

    Attributes:
        waited_s: how long training has waited for saves.
    """

    def __init__(self, uri: str, worker: Worker, *, identity: str, keep: int = 2) -> None:
        self._uri, self._worker, self._identity, self._keep = uri, worker, identity, keep
        self._group: dist.ProcessGroup | None = None
        self._mesh: DeviceMesh | None = None
        if worker.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            self._mesh = DeviceMesh.from_group(self._group, "cpu")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="training-state")
        self._writing: Future[None] | None = None
        self._last_save = time.monotonic()
        self.waited_s = 0.0

    def is_due(self, every_s: float | None) -> bool:
        """Whether the last save began ``every_s`` seconds ago, or more, and has ended."""
        is_busy = self._writing is not None and not self._writing.done()
        return every_s is not None and not is_busy and time.monotonic() - self._last_save >= every_s

    def save(
        self, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Copy the state; a thread writes it, after the one before.

        Raises:
            StorageError: the save before this one failed.
        """
        started = time.monotonic()
        self.wait()
        tensors = self._own_part({**named_tensors(model), **_moments(model, optimizer)})
        tensors |= self._generators()
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        if self._worker.device.startswith("cuda"):
            torch.cuda.synchronize(self._worker.device)
        records = {table: list(rows) for table, rows in state.records.items()}
        copy = TrainingState(state.step, state.num_tokens, state.elapsed_s, records)
        stand_ins = {name: self._stand_in(tensor) for name, tensor in tensors.items()}
        self._writing = self._thread.submit(self._write, copy, stand_ins, copies)
        self._last_save = time.monotonic()
        self.waited_s += self._last_save - started

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            StorageError: it failed on one of the workers.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait for the save that is going on, whatever comes of it."""
        self._thread.shutdown()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _own_part(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a shard, this worker's; of what all have, an even share of the bytes."""
        loads = [0] * self._worker.world_size
        own: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                if _local(tensor).numel():
                    own[name] = tensor
                continue
            writer = loads.index(min(loads))
            loads[writer] += tensor.numel() * tensor.element_size()
            if writer == self._worker.rank:
                own[name] = tensor
        return own

    def _generators(self) -> dict[str, torch.Tensor]:
        rank, device = self._worker.rank, self._worker.device
        generators = {f"rank{rank}.cpu": torch.get_rng_state()}
        if device.startswith("cuda"):
            generators[f"rank{rank}.cuda"] = torch.cuda.get_rng_state(device)
        return generators

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same type, shape and part, but of one number.

        ``dcp`` plans with these: it leaves reference cycles, which would keep copies for a while.
        """
        local = _local(tensor)
        number = torch.zeros((), dtype=local.dtype).expand(local.shape)
        if not isinstance(tensor, DTensor):
            return number
        return DTensor.from_local(
            number,
            self._mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _write(
        self,
        state: TrainingState,
        tensors: dict[str, torch.Tensor],
        copies: dict[str, torch.Tensor],
    ) -> None:
        folder = storage.join(self._uri, _folder(state.step))

        def publish(sizes: dict[str, int]) -> None:
            records = json.dumps(state.records).encode()
            storage.write_atomic(storage.join(folder, "records.json"), records)
            sizes["records.json"] = len(records)
            meta = {
                "state_version": STATE_VERSION,
                "identity": self._identity,
                "step": state.step,
                "num_tokens": state.num_tokens,
                "elapsed_s": state.elapsed_s,
                "world_size": self._worker.world_size,
                "sizes": sizes,
            }
            storage.write_json(storage.join(folder, "state.json"), meta)
            older = [step for step in _steps(self._uri) if step < state.step]
            for step in older[: max(0, len(older) + 1 - self._keep)]:
                storage.remove(storage.join(self._uri, _folder(step)))

        writer = ShardWriter(folder, self._worker.rank, copies, publish)
        try:
            dcp.save(
                tensors,
                storage_writer=writer,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            raise _cause(error, f"The training state '{folder}' cannot be written") from error
        finally:
            copies.clear()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState | None:
        """Load the newest whole state into ``model`` and ``optimizer``; None where there is none.

        Raises:
            TrainingError: the state belongs to another run or to another model, or it cannot be
                read.
        """
        newest: dict[str, Any] | KeRayError | None = None
        if self._worker.is_main:  # what one worker sees in a store another may not see yet
            try:
                newest = self._newest()
            except KeRayError as error:
                newest = error
        newest = all_gather_objects(newest, self._worker)[0]
        if newest is None:
            return None
        if isinstance(newest, KeRayError):
            raise newest
        folder = storage.join(self._uri, _folder(newest["step"]))
        reader = ShardReader(folder, newest["sizes"])
        targets = self._targets(reader, model, optimizer, folder)
        try:
            dcp.load(
                targets,
                storage_reader=reader,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            raise _cause(error, f"The training state '{folder}' cannot be read") from error
        _set_moments(targets, model, optimizer)
        rank, device = self._worker.rank, self._worker.device
        if (own := targets.get(f"rank{rank}.cpu")) is not None:
            torch.set_rng_state(own)
        if (own := targets.get(f"rank{rank}.cuda")) is not None:
            torch.cuda.set_rng_state(own, device)
        return TrainingState(
            step=newest["step"],
            num_tokens=newest["num_tokens"],
            elapsed_s=newest["elapsed_s"],
            records=_read_records(folder),
        )

    def _newest(self) -> dict[str, Any] | None:
        """``state.json`` of the newest whole state."""
        for step in reversed(_steps(self._uri)):
            folder = storage.join(self._uri, _folder(step))
            try:
                meta = storage.read_json(storage.join(folder, "state.json"))
            except FileNotFoundError:
                continue
            if meta.get("identity") != self._identity or meta.get("state_version") not in range(
                1, STATE_VERSION + 1
            ):
                raise TrainingError(
                    f"The training state in '{folder}' belongs to another study or version; give "
                    "another output folder, or remove that one."
                )
            try:
                for name, size in meta["sizes"].items():
                    found = storage.file_size(storage.join(folder, name))
                    if found != size:
                        raise ValueError(f"{name} has {found} bytes, not {size}")
                ShardReader(folder, meta["sizes"])
                _read_records(folder)
            except (
                *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError),
            ) as error:
                _log.warning(
                    "the training state in %s is damaged (%s); using an older one", folder, error
                )
                continue
            return {**meta, "step": step}
        return None

    def _targets(
        self,
        reader: ShardReader,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: str,
    ) -> dict[str, torch.Tensor]:
        """The tensors that a state is read into, by their names there.

        Raises:
            TrainingError: the state has other tensors than the model.
        """
        model_tensors = named_tensors(model)
        targets: dict[str, torch.Tensor] = {n: t.detach() for n, t in model_tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors.items()}
        different = set(shapes) - set(reader.tensors)
        for name, stored in reader.tensors.items():
            dtype = stored.properties.dtype
            if GENERATOR.fullmatch(name):
                kind = "cuda" if self._worker.device.startswith("cuda") else "cpu"
                if name in (f"rank{self._worker.rank}.cpu", f"rank{self._worker.rank}.{kind}"):
                    targets[name] = torch.empty(stored.size, dtype=dtype)
                continue
            owner, is_moment, _ = name.partition("::")
            shape = tuple(stored.size)
            # A counter of steps is one number, of a parameter of any shape.
            if owner not in shapes or shape not in ((shapes[owner],) + ((),) * bool(is_moment)):
                different.add(name)
            elif is_moment and shape:
                targets[name] = torch.zeros_like(targets[owner], dtype=dtype)
            elif is_moment:
                # A fused optimizer keeps its step counter on the device, the others on the CPU.
                device = targets[owner].device if optimizer.defaults.get("fused") else "cpu"
                targets[name] = torch.zeros((), dtype=dtype, device=device)
        if different:
            raise TrainingError(
                f"The training state in '{folder}' is of another model: the two differ in "
                f"{sorted(different)[:3]}. Give another output folder, or remove that one."
            )
        return targets


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    local = _local(tensor).detach()
    copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
    return copy.copy_(local, non_blocking=True)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}::{key}": value
        for name, parameter in unwrap(model).named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_moments(
    tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    parameters = dict(unwrap(model).named_parameters())
    for name, tensor in tensors.items():
        owner, is_moment, moment = name.partition("::")
        if is_moment:
            optimizer.state[parameters[owner]][moment] = tensor


def _cause(error: CheckpointException, what: str) -> KeRayError:
    """The first worker's own error."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    if isinstance(cause, KeRayError):
        return cause
    if isinstance(cause, OSError):
        return StorageError(f"{what} by worker {rank}: {cause.strerror or cause}.")
    return TrainingError(f"{what} by worker {rank}: {type(cause).__name__}: {cause}.")


def _read_records(folder: str) -> dict[str, list[dict[str, Any]]]:
    records: dict[str, list[dict[str, Any]]] = json.loads(
        storage.read_bytes(storage.join(folder, "records.json"))
    )
    return records


def _folder(step: int) -> str:
    return f"step{step:08d}"


def _steps(uri: str) -> list[int]:
    names = [name for name in storage.list_dir(uri) if name.startswith("step")]
    return sorted(int(name[4:]) for name in names if name[4:].isdigit())


def remove_states(uri: str) -> None:
    """Remove all states of a run that is finished."""
    storage.remove(uri)
