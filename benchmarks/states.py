"""Training states: the share of a step that saving takes, and host memory, per worker.

    python benchmarks/states.py [--json] [--workers 2] [--d-model 512] [--steps 40] [--every 10]
                                [--folder FOLDER]

Workers are processes that meet over gloo on this machine's CPUs and train an OLMo of 4 layers with
FSDP2 on random rows; a state is saved every ``--every`` steps, and its writing has to end before
the next one. Printed per worker: the part of the time after the first save that training waited for
saves (copies in host memory, and saves that had not ended), and the largest resident memory that
saving added, in shards (weights and moments of a worker). The first save and the last are left out:
one loads code, the other has no step left to hide behind.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from transformers import OlmoConfig, OlmoForCausalLM

from ke_ray.studies.training import OptimizerSettings
from ke_ray.training.checkpoint import States, TrainingState
from ke_ray.training.loss import row_losses
from ke_ray.training.optimizer import build_optimizer
from ke_ray.training.parallel import Worker, wrap_model

ROWS, TOKENS = 2, 256  # per worker


def work(worker: Worker, options: argparse.Namespace, folder: str, results: Any) -> None:
    """Train and save as one worker; puts (waited / time, added memory / shard, shard bytes)."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=worker.rank,
        world_size=worker.world_size,
    )
    d_model = options.d_model
    config = OlmoConfig(
        vocab_size=16_384,
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=TOKENS,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = wrap_model(OlmoForCausalLM(config), worker, strategy="fsdp", precision="float32")
    optimizer = build_optimizer(model, OptimizerSettings())
    shard = 3 * sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    ids = torch.randint(2, 16_384, (ROWS, TOKENS))
    added, started, waited_before = 0, 0.0, 0.0
    with closing(States(f"{folder}/states", worker, identity="")) as states:
        for step in range(1, options.steps + 1):
            row_losses(model, ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % options.every == 0 and step < options.steps:
                before = reset_peak()
                states.save(TrainingState(step), model, optimizer)
                added = max(added, resident() - before)
                if not started:
                    states.wait()
                    started, waited_before = time.monotonic(), states.waited_s
        duration = time.monotonic() - started
        waited = states.waited_s - waited_before
    results.put((waited / duration, added / shard, shard))
    dist.destroy_process_group()


def resident() -> int:
    """The largest resident memory since :func:`reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but still the process's, would not count
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--folder", help="where states are written; default: a temporary folder")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        processes = [
            context.Process(
                target=work, args=(Worker(rank, options.workers), options, folder, results)
            )
            for rank in range(options.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = [results.get() for process in processes if process.exitcode == 0]
    values = {
        "workers": options.workers,
        "shard_mb": max(shard for *_, shard in found) / 1e6,
        "waited_share": max(waited for waited, *_ in found),
        "host_memory_shards": max(added for _, added, _ in found),
    }
    print("\n".join(f"{name:<20}{value:10.3f}" for name, value in values.items()))
    if options.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
