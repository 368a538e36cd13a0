"""Evaluation shared among W workers against one worker, in CPU time of the busiest worker.

    python benchmarks/shared_evaluation.py [--json] [--workers 2] [--rounds 5]

Shape: OLMo, 6 layers, d_model 384, d_mlp 1,536, 6 heads, vocabulary 16,384, random weights in
float32; W processes of one thread each that meet over gloo. A snapshot of generated items: probes
of 10 to 60 tokens, rows for perplexity and rows for knowledge entropy.

    alone    one worker has all items                                          (floor: W times)
    ddp      W workers, each with the whole model
    fsdp     W workers, each with a shard: weights are gathered in every pass

Target: ddp and fsdp each at most 1.25 / W of alone. Wall-clock time is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# A waiting thread must not spin: its CPU time would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from interleaved import ratio
from shape import SMALL

from ke_ray.data.corpus import Corpus
from ke_ray.evaluation.perplexity import held_out_perplexity
from ke_ray.evaluation.prefix_tree import Span
from ke_ray.evaluation.sharing import Workers
from ke_ray.evaluation.spans import score_spans
from ke_ray.training.parallel import Worker, wrap_model
from ke_ray.training.snapshot import coefficient_sums

NUM_PROBES, NUM_ROWS, LENGTH = 600, 16, 256


def make_items() -> tuple[list[Span], Corpus]:
    generator = np.random.default_rng(0)
    spans = []
    for size in generator.integers(10, 61, NUM_PROBES):
        ids = generator.integers(2, SMALL.vocabulary, size).tolist()
        spans.append(Span(ids[:-4], ids[-4:]))
    ids = generator.integers(2, SMALL.vocabulary, (NUM_ROWS, LENGTH)).astype(np.int32)
    return spans, Corpus("rows", ids, np.full(NUM_ROWS, LENGTH, np.int32), "", "generated")


def snapshot(model: torch.nn.Module, workers: Workers) -> list[float]:
    """Sums of all scores."""
    spans, corpus = make_items()
    probes = score_spans(model, spans, workers=workers).logprob_summed.sum()
    perplexity = held_out_perplexity(model, corpus.input_ids, workers=workers).nats_per_token
    sums = coefficient_sums(model, corpus, 4, workers)
    return [float(probes), perplexity, float(sums.mean("coefficients").sum())]


def run(rank: int, size: int, rounds: int, meeting: str, out: str) -> None:
    """One of the workers; the first writes seconds by contender and round."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    whole, sharded = (SMALL.model().requires_grad_(True) for _ in range(2))
    wrap_model(sharded, Worker(rank, size), strategy="fsdp", precision="float32")
    workers = Workers(rank, size)
    contenders: dict[str, Callable[[], list[float]]] = {
        "alone": lambda: snapshot(whole, Workers()) if rank == 0 else [0.0] * 3,
        "ddp": lambda: snapshot(whole, workers),
        "fsdp": lambda: snapshot(sharded, workers),
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first one warms up
        for name, contender in contenders.items():
            torch.distributed.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            scores = torch.tensor(contender())
            taken = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall])
            torch.distributed.all_reduce(taken, torch.distributed.ReduceOp.MAX)
            if number:
                seconds[name].append(taken.tolist())
            if name == "alone":
                expected = scores
            elif rank == 0:
                torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-6)
        if rank == 0:
            print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "seconds.json"))
        arguments = (options.workers, options.rounds, str(Path(folder, "meeting")), out)
        torch.multiprocessing.spawn(run, arguments, nprocs=options.workers)
        seconds = json.loads(Path(out).read_text())
    ratios = {}
    for name in ("ddp", "fsdp"):
        for kind, clock in enumerate(("cpu", "wall")):
            ours, alone = ([taken[kind] for taken in seconds[each]] for each in (name, "alone"))
            bound = 1.25 / options.workers
            target = f"<= {bound:.3f}" if clock == "cpu" else "reported"
            ratios[f"{name}_over_alone.{clock}"] = ratio(ours, alone, target)
    for name, value in ratios.items():
        print(
            f"{name:24s} {value.median:6.3f}  [{value.low:.3f}, {value.high:.3f}]  {value.target}"
        )
    if options.json:
        result = {name: value.as_json() for name, value in ratios.items()}
        print(json.dumps({"ratios": result, "seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
