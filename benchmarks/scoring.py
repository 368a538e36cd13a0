"""Scoring against its floors and against the published way, as ratios of CPU time.

    python benchmarks/scoring.py [--json] [--rounds 10] [--threads 2] [--skip-memory] [--everything]

Shape: 8 layers, d_model 512, d_mlp 2,048, 8 heads, vocabulary 50,304, T = 2,048; batch 1 and 4.

    body      a bare forward of the model's body: SDPA, no LM head, no hooks       (floor)
    gemm      the body's matrix products alone, from counted FLOPs                 (floor)
    full      a forward with LM head, SDPA
    naive     the published way: eager attention, everything kept, LM head, fp32   (peer)
    ke, three ours: knowledge entropy; knowledge, attention and next-token entropy together

To stay under ten minutes, batch 4 runs body, ke and naive only, unless ``--everything`` is given.
Peak memory is measured above the weights, each way in a process of its own.
On a GPU: benchmarks/gpu_scoring.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Threads that spin while another process has their core would count as CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from interleaved import Ratio, ratio, run_rounds
from naive_scoring import NaiveScorer
from shape import MIDDLE

from ke_ray.models.scoring import score_instances, score_model

T = MIDDLE.length
THREE = ("knowledge_entropy", "attention_entropy", "next_token_entropy")


def build(attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return MIDDLE.model(attn_implementation=attention).to(dtype)


def instances(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, MIDDLE.vocabulary, (count, T), generator=generator)


def gemms(batch: int) -> Any:
    """The body's products of one forward pass, on operands of the right shapes."""
    tokens, d_model, d_mlp = batch * T, MIDDLE.d_model, MIDDLE.d_mlp
    x = torch.randn(tokens, d_model)
    wide = torch.randn(tokens, d_mlp)
    square, up, down = (
        torch.randn(d_model, d_model),
        torch.randn(d_model, d_mlp),
        torch.randn(d_mlp, d_model),
    )
    query = torch.randn(batch * MIDDLE.num_heads, T, d_model // MIDDLE.num_heads)
    # Causal attention needs half of each T × T product: half of the keys for every query.
    half_keys = query[:, : T // 2].transpose(1, 2).contiguous()
    scores = torch.randn(batch * MIDDLE.num_heads, T, T // 2)
    half_values = query[:, : T // 2].contiguous()

    def run() -> None:
        for _ in range(MIDDLE.num_layers):
            for _ in range(4):
                torch.mm(x, square)
            for _ in range(2):
                torch.mm(x, up)
            torch.mm(wide, down)
            torch.bmm(query, half_keys)
            torch.bmm(scores, half_values)

    return run


def measure(
    batch: int, rounds: int, everything: bool, say: Any
) -> tuple[dict[str, Ratio], dict[str, list[float]]]:
    """Ratios of CPU time at one batch size."""
    model, rough = build(), build(dtype=torch.bfloat16)
    naive = NaiveScorer(build("eager"))
    ids = instances(batch)

    def score(which: Any, *measures: str) -> None:
        score_instances(which, ids, measures=measures, num_instances=batch, batch_size=batch)

    @torch.inference_mode()
    def body() -> None:
        model.base_model(ids, use_cache=False)

    @torch.inference_mode()
    def full() -> None:
        model(ids, use_cache=False)

    contenders = {
        "body": body,
        "ke": lambda: score(model, "knowledge_entropy"),
        "ke_bf16": lambda: score(rough, "knowledge_entropy"),
        "naive": lambda: naive.knowledge_entropy(ids, batch),
    }
    if everything:
        contenders |= {
            "full": full,
            "three": lambda: score(model, *THREE),
            "gemm": gemms(batch),
        }
    seconds = run_rounds(
        contenders,
        rounds,
        lambda text: say(f"batch {batch}: {text}"),
    )
    naive.close()

    bounds = (
        ("ke", "body", "<= 1.03"),
        ("naive", "ke", ">= 2.7"),
        ("naive", "ke_bf16", ">= 4"),
        ("three", "full", "<= 1.40"),
        ("naive", "body", "reported"),
        ("body", "gemm", "reported"),
        ("ke", "gemm", "reported"),
    )
    return {
        f"batch{batch}.{a}_over_{b}": ratio(seconds[a], seconds[b], target)
        for a, b, target in bounds
        if a in seconds and b in seconds
    }, seconds


def bf16_error() -> dict[str, float]:
    """bfloat16 against float32: largest difference over layers (total for next-token), nats."""
    ids = instances(1)
    exact, rough = (
        score_model(build(dtype=dtype), ids, measures=THREE)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return {
        name: max(
            abs(a.value - b.value)
            for a, b in zip(exact.rows, rough.rows, strict=True)
            if a.measure == name and (a.layer is not None or name == "next_token_entropy")
        )
        for name in THREE
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_of(way: str, batch: int, count: int) -> int:
    """Peak bytes above the loaded weights; runs in a process of its own."""
    ids = instances(count)
    if way == "naive":
        scorer = NaiveScorer(build("eager"))
        run = lambda: scorer.knowledge_entropy(ids, batch)  # noqa: E731
    else:
        model = build()
        measures = THREE if way == "three" else ("knowledge_entropy",)
        run = lambda: score_instances(  # noqa: E731
            model, ids, measures=measures, num_instances=count, batch_size=batch
        )
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    run()
    return resident("VmHWM") - before


def memory(say: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Ratios of peaks at batch 4, and the peaks in bytes."""

    def peak(way: str, count: int) -> int:
        command = [sys.executable, __file__, "--peak", way, "4", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[f"{way}.{count}_instances"] = int(done.stdout.split()[-1])
        say(f"peak memory of {way}, {count} instances: measured")
        return peaks[f"{way}.{count}_instances"]

    peaks: dict[str, int] = {}
    naive = peak("naive", 4)
    ratios = {}
    for way, more in (("ke", 16), ("three", 8)):
        few = peak(way, 4)
        ratios[f"memory.{way}_over_naive"] = few / naive
        ratios[f"memory.{way}_{more}_over_4_instances"] = peak(way, more) / few
    return ratios, peaks


def machine() -> dict[str, str]:
    import transformers

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds at batch 1")
    parser.add_argument("--rounds-batch4", type=int, default=None, help="default: as --rounds")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--everything", action="store_true", help="all contenders at batch 4 too")
    parser.add_argument("--peak", nargs=3, metavar=("WAY", "BATCH", "COUNT"), help="internal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        way, batch, count = options.peak
        print(peak_of(way, int(batch), int(count)))
        return

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    timed: dict[str, Ratio] = {}
    cpu_seconds: dict[str, list[float]] = {}
    later = options.rounds if options.rounds_batch4 is None else options.rounds_batch4
    for batch, rounds in ((1, options.rounds), (4, later)):
        if rounds:
            found, seconds = measure(batch, rounds, batch == 1 or options.everything, say)
            for name, value in found.items():
                spread = f"[{value.low:.3f}, {value.high:.3f}]"
                print(f"{name:32s} {value.median:6.3f}  {spread}  {value.target}", flush=True)
            timed |= found
            cpu_seconds |= {f"batch{batch}.{k}": v for k, v in seconds.items()}
    sizes, peaks = ({}, {}) if options.skip_memory else memory(say)
    error = bf16_error()
    for name, number in sizes.items():
        print(f"{name:32s} {number:6.3f}")
    for name, nats in error.items():
        print(f"bf16 error of {name:20s} {nats:.1e} nats")
    if options.json:
        result = {
            "ratios": {k: v.as_json() for k, v in timed.items()}
            | {k: round(v, 4) for k, v in sizes.items()},
            "bf16_error_nats": error,
            "peak_bytes": peaks,
            "cpu_seconds": {k: [round(s, 3) for s in v] for k, v in cpu_seconds.items()},
            "machine": machine(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
