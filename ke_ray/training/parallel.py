"""Parallel training: ranks, devices, collectives and model wrappers.

Built on ``torch.distributed`` alone, so that the loop runs the same under Ray Train, under
``torch.multiprocessing`` and in a single process (where no process group is needed).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ke_ray.errors import ConfigError, UnsupportedArchitectureError


@dataclass(frozen=True)
class Worker:
    """One training process among ``world_size``."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes files."""
        return self.rank == 0


def lone_worker(use_gpu: bool | None) -> Worker:
    """The only worker of a study, in this process, on the device that the study asks for.

    Args:
        use_gpu: as in studies; None: where this process has a GPU that torch can use.

    Raises:
        ConfigError: a GPU is requested and there is none.
    """
    if use_gpu is not False and torch.cuda.is_available():
        return Worker(device="cuda")
    if use_gpu:
        raise ConfigError(
            f"use_gpu is true, but torch {torch.__version__} finds no GPU in this process. Leave "
            "use_gpu out to train on CPUs too, or run it where there is one (a job gets one by "
            "entrypoint_num_gpus)."
        )
    return Worker()


def all_reduce_sum(tensor: torch.Tensor, worker: Worker) -> torch.Tensor:
    """The sum over workers, in place."""
    if worker.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_objects(value: Any, worker: Worker) -> list[Any]:
    """Gather one picklable value from each worker, by rank."""
    if worker.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * worker.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def main_says(answer: bool, worker: Worker) -> bool:
    """The main worker's answer, on every worker: what one sees in a store another may not yet."""
    own = torch.tensor(float(answer and worker.is_main), device=worker.device)
    return bool(all_reduce_sum(own, worker))


def barrier(worker: Worker) -> None:
    """Wait for all workers."""
    if worker.world_size > 1:
        dist.barrier()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a transformers decoder's blocks.

    Raises:
        UnsupportedArchitectureError: no module list has as many entries as the config has layers.
    """
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} has no list of {n_layers} decoder layers that could be sharded "
        "or compiled; train it with strategy: ddp and compile: false."
    )


def wrap_model(
    model: nn.Module,
    worker: Worker,
    *,
    strategy: Literal["ddp", "fsdp"],
    precision: Literal["float32", "bfloat16"],
) -> nn.Module:
    """Wrap a model so that all workers train it together.

    One worker: the model itself. ``ddp``: DistributedDataParallel. ``fsdp``: FSDP2, each decoder
    layer and then the rest sharded in place; under bfloat16 weights are gathered in bfloat16 and
    gradients summed in float32.
    """
    if worker.world_size == 1:
        return model
    if strategy == "ddp":
        ids = [torch.device(worker.device).index] if worker.device.startswith("cuda") else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True
        )
    mesh = init_device_mesh(torch.device(worker.device).type, (worker.world_size,))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def accumulate(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Replicas exchange gradients only in the ``last`` micro-batch of a step.

    FSDP does so in each: every worker would otherwise hold the gradients of the whole model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    module = unwrap(model)
    buffers = {n: b for n, b in module.named_buffers() if n in module.state_dict(keep_vars=True)}
    return {**dict(module.named_parameters()), **buffers}


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (a collective: call it on every worker), on the CPU."""
    whole = getattr(tensor, "full_tensor", None)
    return (whole() if whole is not None else tensor).detach().to("cpu")
