"""A tiny model, tiny data, and training workers as processes of their own.

Workers are forked from a server that has imported torch and transformers once; with
``world_size`` > 1 they meet over gloo through a file.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_process import start_process
from transformers import OlmoConfig, OlmoeConfig, OlmoeForCausalLM, OlmoForCausalLM

from ke_ray.storage import files
from ke_ray.studies.training import TrainingSettings
from ke_ray.training import loop, state_files
from ke_ray.training.checkpoint import TrainingState
from ke_ray.training.loop import Hooks, train
from ke_ray.training.loss import row_losses
from ke_ray.training.parallel import Worker
from ke_ray.training.state_files import ShardWriter

VOCABULARY = 64


class ArrayRows:
    """Token rows in memory, as a data set."""

    def __init__(self, ids: np.ndarray, seed: int = 0) -> None:
        self.ids, self.seed = ids, seed

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return self.ids[indices].astype(np.int64)

    def order(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self))


def tiny_model(seed: int = 0, **changes: Any) -> OlmoForCausalLM:
    """Two layers, d 16: small enough for hundreds of steps in a second or two."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "attention_dropout": 0.0,
    }
    return OlmoForCausalLM(OlmoConfig(**{**values, **changes}))


def tiny_mixture(seed: int = 0) -> OlmoeForCausalLM:
    """The same size with four experts, two for each token."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return OlmoeForCausalLM(config)


def tiny_rows(num_instances: int = 40, sequence_length: int = 12, seed: int = 0) -> ArrayRows:
    """Rows with structure (each token depends on the one before), so that a loss can fall."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(1, 4, size=(num_instances, sequence_length))
    return ArrayRows((np.cumsum(steps, axis=1) % VOCABULARY).astype(np.int32), seed)


def tiny_keys(**changes: Any) -> TrainingSettings:
    """Keys for eight rows of twelve tokens a step."""
    values: dict[str, Any] = {
        "output": "unused",
        "sequence_length": 12,
        "global_batch_size": 8,
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_fraction": 0.1},
    }
    return TrainingSettings.model_validate({**values, **changes})


def start_worker(**job: Any) -> ForkServerProcess:
    """A process that trains as :func:`main` says; what goes wrong is in ``<out>.txt``."""
    return start_process(_run, job)


def _run(job: dict[str, Any]) -> None:
    try:
        main(job)
    except BaseException:
        Path(job["out"] + ".txt").write_text(traceback.format_exc())
        raise


def run_workers(folder: Path, world_size: int, **job: Any) -> dict[str, np.ndarray]:
    """Train with ``world_size`` processes; losses, gradient norms and weights of rank 0."""
    meeting = folder / f"meeting{world_size}"
    meeting.unlink(missing_ok=True)
    outs = [folder / f"out{world_size}-{rank}.npz" for rank in range(world_size)]
    workers = [
        start_worker(rank=rank, world_size=world_size, meeting=str(meeting), out=str(out), **job)
        for rank, out in enumerate(outs)
    ]
    for worker, out in zip(workers, outs, strict=True):
        worker.join(timeout=120)
        problem = Path(f"{out}.txt")
        assert worker.exitcode == 0, problem.read_text() if problem.exists() else worker.exitcode
    return dict(np.load(outs[0]))


def run_together(folder: Path, world_size: int, function: Callable[..., Any], *args: Any) -> list:
    """``function(worker, *args)`` in that many processes, which meet over gloo.

    Returns:
        Of each worker, by rank, what it returned (as JSON), or its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meeting, outs = folder / "meeting", [folder / f"{rank}.json" for rank in range(world_size)]
    workers = [
        start_process(_run_function, rank, world_size, str(meeting), str(out), function, args)
        for rank, out in enumerate(outs)
    ]
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0, worker.exitcode
    return [json.loads(out.read_text()) for out in outs]


def _run_function(
    rank: int,
    world_size: int,
    meeting: str,
    out: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    worker = Worker(rank, world_size)
    _meet(worker, meeting)
    try:
        result = function(worker, *args)
    except Exception:
        result = traceback.format_exc()
    Path(out).write_text(json.dumps(result))


def _meet(worker: Worker, meeting: str) -> None:
    torch.set_num_threads(1)
    if worker.world_size > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=worker.rank,
            world_size=worker.world_size,
        )


def _die_in_save(number: int, method: str) -> None:
    """Kill this process in that method of the writer of the training state of that number."""
    calls: list[int] = []
    before = getattr(ShardWriter, method)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            if method == "write_data":  # after the first piece of the file
                files._pieces = _killed_after_one  # type: ignore[assignment]
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **options)

    setattr(ShardWriter, method, call)


def _killed_after_one(payload: Sequence[memoryview]) -> Iterator[memoryview]:
    yield payload[0]
    os.kill(os.getpid(), signal.SIGKILL)


def _count_bytes_read() -> list[int]:
    counts: list[int] = []
    before = state_files._rows

    def count(*args: Any) -> torch.Tensor:
        rows = before(*args)
        counts.append(rows.untyped_storage().nbytes())
        return rows

    state_files._rows = count
    return counts


def main(job: dict[str, Any]) -> None:
    """Train as one worker."""
    worker = Worker(job.get("rank", 0), job.get("world_size", 1))
    _meet(worker, job.get("meeting", ""))
    model = tiny_mixture() if job.get("mixture") else tiny_model(**job.get("config", {}))
    if job.get("dropout"):  # draws random numbers in every step
        model.config.attention_dropout = job["dropout"]
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = job["dropout"]

    def end(step: int, _model: object, _state: object) -> None:
        if step == job.get("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == job.get("stop_after"):
            raise KeyboardInterrupt

    if "die_in_save" in job:
        _die_in_save(*job["die_in_save"])
    bytes_read = _count_bytes_read()
    if "max_logits" in job:
        loop.row_losses = partial(row_losses, max_logits=job["max_logits"])
    held: list[int] = []  # elements of a parameter's gradient here, when a forward pass begins
    if job.get("watch_gradients"):
        watched = model.model.layers[1].mlp.up_proj

        def watch(*_: object) -> None:
            gradient = watched.weight.grad
            local = getattr(gradient, "to_local", lambda: gradient)()
            held.append(0 if local is None else local.numel())

        model.model.layers[0].register_forward_pre_hook(watch)
    steps = {job[key] for key in ("die_after", "stop_after") if key in job}
    try:
        state = train(
            model,
            tiny_rows(),
            tiny_keys(**job.get("keys", {})),
            num_steps=job.get("num_steps", 12),
            worker=worker,
            hooks=Hooks(after_step=end, at_steps=frozenset(steps)),
            state_uri=job.get("state_uri"),
            identity="tiny",
        )
    except KeyboardInterrupt:
        state = TrainingState(records={"train": []})
    from ke_ray.training.parallel import full_tensor

    weights = {f"weight {n}": full_tensor(p).numpy() for n, p in model.named_parameters()}
    rows = state.records["train"]
    np.savez(
        job["out"],
        loss=[row["loss"] for row in rows],
        grad_norm=[row["grad_norm"] for row in rows],
        bytes_read=sum(bytes_read),
        **({"held": held} if held else {}),
        **weights,
    )
    if worker.world_size > 1:
        torch.distributed.destroy_process_group()
