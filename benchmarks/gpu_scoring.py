"""Scoring on a GPU: the share of measured matrix peak that knowledge entropy reaches.

    python benchmarks/gpu_scoring.py [--json] [--rounds 10] [--batch 8] [--device cuda]

Shape of OLMo-1B (16 layers, d_model 2,048, d_mlp 8,192, 16 heads, vocabulary 50,304), bfloat16,
T = 2,048. Counted FLOPs: the body's products, the causal half of attention, the LM head where it is
used; for knowledge entropy not the last second projection, which is not run. The second attention
call of the entropy is not counted. Peak: the best of a few large bfloat16 products on this device.

``--device cpu --tiny`` runs the same code on small sizes anywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from interleaved import clock_of, run_rounds
from shape import OLMO_1B, Shape

from ke_ray.models.scoring import score_instances

THREE = ("knowledge_entropy", "attention_entropy", "next_token_entropy")


def flops(shape: Shape, tokens: int, *, head: bool) -> float:
    """Floating-point operations of one scored pass, two a multiply-add."""
    body = shape.body_flops_per_token + shape.attention_flops_per_token
    last_projection = 2 * shape.d_model * shape.d_mlp
    return float(tokens) * (body + (shape.head_flops_per_token if head else -last_projection))


def peak_flops(device: str, size: int) -> float:
    """Operations per second of the best of 30 large bfloat16 products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock, best = clock_of(device), math.inf
    for _ in range(30):
        start = clock()
        torch.mm(a, b)
        best = min(best, clock() - start)
    return 2.0 * size**3 / best


def measure(shape: Shape, device: str, batch: int, rounds: int) -> dict[str, Any]:
    with torch.device(device):  # random weights of 7B parameters would take minutes elsewhere
        model = shape.model().to(torch.bfloat16)
    count = 2 * batch
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, shape.vocabulary, (count, shape.length), generator=generator)

    def score(*measures: str) -> Callable[[], object]:
        return lambda: score_instances(
            model, ids, measures=measures, num_instances=count, batch_size=batch
        )

    @torch.inference_mode()
    def body() -> None:
        for part in ids.split(batch):
            model.base_model(part.to(device), use_cache=False)

    ways = {
        "body": body,
        "ke": score("knowledge_entropy"),
        "ke_attention": score("knowledge_entropy", "attention_entropy"),
        "three": score(*THREE),
    }
    times = run_rounds(ways, rounds, clock=clock_of(device))
    peak = peak_flops(device, 8192 if device.startswith("cuda") else 512)
    tokens = count * shape.length
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratios": {
            "ke_share_of_peak": flops(shape, tokens, head=False) / middle["ke"] / peak,
            "three_share_of_peak": flops(shape, tokens, head=True) / middle["three"] / peak,
            "ke_over_body": middle["ke"] / middle["body"],
            "with_attention_over_ke": middle["ke_attention"] / middle["ke"],
        },
        "targets": {"ke_share_of_peak": ">= 0.60", "three_share_of_peak": ">= 0.45"},
        "tokens_per_s": {name: tokens / value for name, value in middle.items()},
        "peak_flops": peak,
        "seconds": times,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device here; this benchmark needs one (or --device cpu --tiny)")
    shape = Shape(2, 64, 128, 4, 512, 64) if options.tiny else OLMO_1B
    result = measure(shape, options.device, options.batch, options.rounds)
    for name, value in result["ratios"].items():
        print(f"{name:24s} {value:.3f}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
