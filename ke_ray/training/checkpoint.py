"""Training states, from which a killed run resumes as if it had not been killed.

A state is a folder ``step<NNNNNNNN>`` under any storage URI::

    model.safetensors        parameters and buffers, in their own dtype, by name
    optimizer.safetensors    "<parameter>::<moment>" tensors
    rng.safetensors          per worker: torch CPU generator, and CUDA's where there is one
    records.json             rows recorded so far (losses, probes, …)
    state.json               step, data position, identity, sizes of the files above; written last

``state.json`` makes a state valid: a folder without it, or whose files have other sizes, was left
incomplete by a kill and is skipped. On one CPU worker a resumed run equals the undisturbed one bit
by bit. No pickle is read or written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.distributed.tensor import distribute_tensor

from ke_ray import storage
from ke_ray.errors import TrainingError
from ke_ray.training.parallel import (
    Worker,
    all_gather_objects,
    barrier,
    full_tensor,
    unwrap,
)

STATE_VERSION = 1
_log = logging.getLogger(__name__)


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


def _folder(step: int) -> str:
    return f"step{step:08d}"


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    module = unwrap(model)
    buffers = {n: b for n, b in module.named_buffers() if n in module.state_dict(keep_vars=True)}
    return {**dict(module.named_parameters()), **buffers}


def full_tensors(model: nn.Module, worker: Worker) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers on the main worker's CPU, whole also of a sharded model.

    A collective under FSDP: call it on every worker; the others get an empty dictionary. Tied
    weights come once.
    """
    return _gathered(_named_tensors(model), worker)


def _gathered(tensors: dict[str, torch.Tensor], worker: Worker) -> dict[str, torch.Tensor]:
    whole = {}
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor)
        if worker.is_main:  # the others would hold as much for nothing
            whole[name] = gathered.contiguous()
    return whole


def _rng_tensors(worker: Worker) -> dict[str, torch.Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if worker.device.startswith("cuda"):
        own["cuda"] = torch.cuda.get_rng_state(worker.device)
    gathered = all_gather_objects(own, worker)
    return {f"rank{r}.{kind}": t for r, part in enumerate(gathered) for kind, t in part.items()}


def save_state(
    uri: str,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    worker: Worker,
    *,
    identity: str,
    keep: int = 2,
) -> None:
    """Write the state of all workers under ``uri``; call it on every worker.

    Args:
        identity: fingerprint of the run, compared on load.
        keep: how many states to keep; older ones are removed after this one is complete.
    """
    folder, sizes = storage.join(uri, _folder(state.step)), {}

    def write(name: str, payload: bytes) -> None:
        storage.write_atomic(storage.join(folder, name), payload)
        sizes[name] = len(payload)

    # One file after the other: host memory has to hold the largest of them, and its bytes.
    tensors = full_tensors(model, worker)
    if worker.is_main:
        write("model.safetensors", save_safetensors(tensors))
    del tensors
    moments = {
        f"{name}::{key}": value
        for name, parameter in unwrap(model).named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    moments = _gathered(moments, worker)
    rng = _rng_tensors(worker)
    if worker.is_main:
        write("optimizer.safetensors", save_safetensors(moments))
        write("rng.safetensors", save_safetensors(rng))
        write("records.json", json.dumps(state.records).encode())
        meta = {
            "state_version": STATE_VERSION,
            "identity": identity,
            "step": state.step,
            "num_tokens": state.num_tokens,
            "elapsed_s": state.elapsed_s,
            "world_size": worker.world_size,
            "sizes": sizes,
        }
        storage.write_json(storage.join(folder, "state.json"), meta)
        for old in _steps(uri)[:-keep]:
            storage.remove(storage.join(uri, _folder(old)))
    barrier(worker)


def _steps(uri: str) -> list[int]:
    names = [name for name in storage.list_dir(uri) if name.startswith("step")]
    return sorted(int(name[4:]) for name in names if name[4:].isdigit())


def _read_meta(folder: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(folder, "state.json"))
    except FileNotFoundError:
        return None


def load_state(
    uri: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    worker: Worker,
    *,
    identity: str,
) -> TrainingState | None:
    """Load the newest usable state into ``model`` and ``optimizer``; None where there is none.

    Raises:
        TrainingError: the state belongs to another run (``identity`` differs).
    """
    for step in reversed(_steps(uri)):
        folder = storage.join(uri, _folder(step))
        meta = _read_meta(folder)
        if meta is None:
            continue
        if meta.get("identity") != identity or meta.get("state_version") != STATE_VERSION:
            raise TrainingError(
                f"The training state in '{folder}' belongs to another study or version; give "
                "another output folder, or remove that one."
            )
        try:
            saved = _read_files(folder, meta)
        except (OSError, ValueError, LookupError, RecursionError, SafetensorError) as error:
            _log.warning(
                "the training state in %s is damaged (%s); using an older one", folder, error
            )
            continue
        _restore(model, optimizer, saved["model"], saved["optimizer"])
        _restore_rng(saved["rng"], worker)
        return TrainingState(
            step=meta["step"],
            num_tokens=meta["num_tokens"],
            elapsed_s=meta["elapsed_s"],
            records=saved["records"],
        )
    return None


def _read_files(folder: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Contents of a state's files, by their names without ending.

    Raises:
        OSError, ValueError, LookupError, RecursionError, SafetensorError: a file is missing, has
            another size than it was written with, or is malformed.
    """
    contents: dict[str, Any] = {}
    for name, size in meta["sizes"].items():
        payload = storage.read_bytes(storage.join(folder, name))
        if len(payload) != size:
            raise ValueError(f"{name} has {len(payload)} bytes, not {size}")
        stem, _, kind = name.rpartition(".")
        contents[stem] = json.loads(payload) if kind == "json" else load_safetensors(payload)
    return {name: contents[name] for name in ("model", "optimizer", "rng", "records")}


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, torch.Tensor],
    optimizer_tensors: dict[str, torch.Tensor],
) -> None:
    targets = _named_tensors(model)
    if set(saved) != set(targets):
        different = sorted(set(saved) ^ set(targets))[:3]
        raise TrainingError(f"The training state has other tensors than the model: {different}.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_like(saved[name], target))
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in optimizer_tensors.items():
        name, _, moment = key.rpartition("::")
        moments.setdefault(name, {})[moment] = value
    for name, parameter in unwrap(model).named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                # A fused optimizer keeps its step counter on the device, the others on the CPU.
                key: value if value.ndim == 0 and not _fused(optimizer) else _like(value, parameter)
                for key, value in moments[name].items()
            }


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A copy of ``value`` on the target's device, sharded as the target is (scalars never are)."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None or value.ndim == 0:
        return value.to(target.device, copy=True)
    # Every worker has read the whole tensor and keeps its own part; nothing is sent.
    placements = target.placements  # type: ignore[attr-defined]
    whole = value.to(target.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).clone()


def _restore_rng(tensors: dict[str, torch.Tensor], worker: Worker) -> None:
    own = tensors.get(f"rank{worker.rank}.cpu")
    if own is not None:
        torch.set_rng_state(own)
    cuda = tensors.get(f"rank{worker.rank}.cuda")
    if cuda is not None and worker.device.startswith("cuda"):
        torch.cuda.set_rng_state(cuda, worker.device)


def remove_states(uri: str) -> None:
    """Remove all states of a run that is finished."""
    storage.remove(uri)
