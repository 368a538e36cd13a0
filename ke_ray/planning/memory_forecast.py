"""Whether training fits the devices, before anything is fetched, packed or started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.errors import CheckpointError, ConfigError, KeRayError
from ke_ray.models.architectures import use_description
from ke_ray.models.configuration import read_config
from ke_ray.models.published import published_config
from ke_ray.planning.training_memory import (
    ModelSizes,
    WorkerMemory,
    is_sharded,
    nearest_fit,
    worker_memory,
)
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.training import PretrainStudy, TrainingSettings

_GIB = 2**30
#: Of a GPU's memory, what CUDA and its libraries take before a tensor is made.
_RUNTIME_BYTES = _GIB
#: What `nearest_fit` may change, in the order in which a message names it.
_CHANGEABLE = ("num_workers", "strategy", "activation_checkpointing", "micro_batch_size")

Measure = Callable[[TrainingSettings], ModelSizes]


@dataclass(frozen=True)
class Device:
    """Memory that one worker has.

    Attributes:
        num_bytes: for tensors; None where this process cannot know it.
        name: for messages.
        is_shared: workers divide the memory of this machine, so that more of them do not help.
    """

    num_bytes: int | None
    name: str
    is_shared: bool = False


def find_device(settings: TrainingSettings, *, in_process: bool, share: float = 1.0) -> Device:
    """The device of a study's workers, as far as it is known here.

    Args:
        in_process: the study trains in this process, and not where Ray places it.
        share: of a GPU that a worker gets.
    """
    if settings.use_gpu is not False:
        if settings.gpu_memory_gib is not None:
            size = settings.gpu_memory_gib * _GIB * share - _RUNTIME_BYTES
            return Device(int(size), f"gpu_memory_gib is {settings.gpu_memory_gib:g}")
        if not _is_elsewhere(in_process):
            import torch

            if torch.cuda.is_available():
                device = torch.cuda.get_device_properties(0)
                return Device(
                    int(device.total_memory * share) - _RUNTIME_BYTES,
                    f"this machine's {device.name} has {device.total_memory / _GIB:.0f} GiB",
                )
    if settings.use_gpu or _is_elsewhere(in_process):
        return Device(None, "give gpu_memory_gib, the memory of one GPU in GiB")
    total = psutil.virtual_memory().total
    name = f"this machine has {total / _GIB:.0f} GiB"
    if settings.num_workers > 1:
        name += f" for {settings.num_workers} workers"
    return Device(total // settings.num_workers, name, is_shared=True)


def _is_elsewhere(in_process: bool) -> bool:
    return not in_process and os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def memory_text(study: PretrainStudy | ContinualStudy) -> str:
    """What each worker of a study needs, part by part, and whether its device has that."""
    measure = measure_of(config_of(study))
    if measure is None:
        return "memory: not known (no configuration of the model could be read here)"
    return describe(study, measure, find_device(study, in_process=_is_in_process(study)))


def check_memory(study: PretrainStudy | ContinualStudy) -> None:
    """Refuse a study that does not fit its workers' device, where that is known.

    Raises:
        ConfigError: says what is needed, and the nearest setting that fits.
    """
    if is_finished(study.output):
        return
    device = find_device(study, in_process=_is_in_process(study))
    if device.num_bytes is None or (measure := measure_of(config_of(study))) is None:
        return
    check_fit(study, measure, device)


def is_finished(output: str) -> bool:
    """Whether a results folder says so of itself; nothing is trained then."""
    path = storage.join(output, "manifest.json")
    if not storage.exists(path):
        return False
    manifest = storage.read_json(path)
    return isinstance(manifest, dict) and manifest.get("status") == "finished"


def _is_in_process(study: PretrainStudy | ContinualStudy) -> bool:
    if isinstance(study, PretrainStudy):
        return study.num_workers == 1
    return study.executor == "inline"


def config_of(study: PretrainStudy | ContinualStudy, *, offline: bool = False) -> Any | None:
    """The configuration of what is trained; of several starts, the first one's."""
    if isinstance(study, PretrainStudy):
        return _fresh_config(study)
    spec = study.starts.spec
    use_description(study.architecture)
    if (config := published_config(spec)) is not None:
        return config
    if offline and not (storage.is_local(spec) and storage.exists(spec)):
        return None
    try:
        return read_config(list_checkpoints(spec, **study.starts.options())[0])
    except CheckpointError:  # what is wrong with it is said where it is read
        return None


def _fresh_config(study: PretrainStudy) -> Any | None:
    from ke_ray.training.initial import build_config

    vocab_size = study.data.vocab_size
    if vocab_size is None:
        from ke_ray.data.tokenizer import load_tokenizer

        path = study.data.tokenizer
        if path is None or not storage.is_local(path) or not storage.exists(path):
            return None
        try:
            tokens = load_tokenizer(path).get_vocab(with_added_tokens=True)
        except KeRayError:
            return None
        vocab_size = max(tokens.values()) + 1
    return build_config(
        study.model,
        vocab_size=-(-vocab_size // 64) * 64,
        sequence_length=study.sequence_length,
        eos_token_id=study.data.eos_token_id or 0,
    )


def measure_of(config: Any | None) -> Measure | None:
    if config is None:
        return None
    from ke_ray.planning.model_sizes import measure_sizes

    @cache
    def sizes(sequence_length: int, precision: str, sharded: bool) -> ModelSizes:
        return measure_sizes(
            config, sequence_length=sequence_length, precision=precision, sharded=sharded
        )

    return lambda s: sizes(s.sequence_length, s.precision, is_sharded(s))


def check_fit(study: TrainingSettings, measure: Measure, device: Device, prefix: str = "") -> None:
    needed = worker_memory(measure(study), study).peak
    if device.num_bytes is None or needed <= device.num_bytes:
        return
    raise ConfigError(
        f"Each worker needs {_gib(needed)} at one time, but {device.name}. "
        f"{_advice(study, measure, device, prefix)} --dry-run shows what takes how much."
    )


def _advice(study: TrainingSettings, measure: Measure, device: Device, prefix: str = "") -> str:
    assert device.num_bytes is not None
    inline = getattr(study, "executor", None) == "inline"
    fit = nearest_fit(
        study, measure, device.num_bytes, may_add_workers=not (device.is_shared or inline)
    )
    if fit is None:
        return (
            "No micro-batch, activation checkpointing or sharding makes it fit; take devices with "
            "more memory, or a smaller model."
        )
    needed = worker_memory(measure(fit), fit).peak
    changes = {name: getattr(fit, name) for name in _CHANGEABLE}
    options = " ".join(
        f"--set {prefix}{name}={str(value).lower()}"
        for name, value in changes.items()
        if value != getattr(study, name)
        and not (name == "micro_batch_size" and value == study.rows_per_forward)
    )
    return f"The nearest setting that fits ({_gib(needed)}): {options}."


def describe(study: TrainingSettings, measure: Measure, device: Device, prefix: str = "") -> str:
    """The parts of a worker's memory as lines, and whether its device holds them."""
    memory = worker_memory(measure(study), study)
    layout = (
        f"{study.num_workers} workers, {study.strategy}" if study.num_workers > 1 else "1 worker"
    )
    lines = [
        f"memory of each worker ({layout}, {study.precision}, {study.rows_per_forward} rows per "
        f"pass, activation checkpointing {'on' if study.activation_checkpointing else 'off'}):"
    ]
    lines += [f"  {name:<26}{_gib(value):>10}" for name, value in _parts(memory).items()]
    if memory.activations is None:
        lines.append("  activations                not known for this architecture")
    if device.num_bytes is None:
        lines.append(f"  its device: not known; {device.name}")
    elif memory.peak <= device.num_bytes:
        lines.append(f"  it fits: {device.name}")
    else:
        lines.append(f"  it does not fit: {device.name}. {_advice(study, measure, device, prefix)}")
        if device.is_shared:
            lines.append("  (for the GPUs of other machines give gpu_memory_gib)")
    lines.append(
        f"host memory of each worker: saving a training state {_gib(memory.saving)}, loading one "
        f"{_gib(memory.loading)}"
    )
    return "\n".join(lines)


def _parts(memory: WorkerMemory) -> dict[str, int]:
    parts = {
        "weights": memory.weights,
        "copies of weights": memory.copies,
        "gradients": memory.gradients,
        "moments": memory.moments,
        "activations": memory.activations,
        "logits": memory.logits,
        "at one time, in a step": memory.training,
        "held while evaluating": memory.evaluation,
    }
    return {name: value for name, value in parts.items() if value is not None}


def _gib(num_bytes: int) -> str:
    if num_bytes < _GIB:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / _GIB:,.1f} GiB"
