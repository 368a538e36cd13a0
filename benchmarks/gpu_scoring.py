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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ke_ray.models.scoring import score_instances

THREE = ("knowledge_entropy", "attention_entropy", "next_token_entropy")


@dataclass(frozen=True)
class Shape:
    n_layers: int = 16
    d_model: int = 2048
    d_mlp: int = 8192
    n_heads: int = 16
    vocabulary: int = 50304
    length: int = 2048

    def flops(self, tokens: int, *, head: bool) -> float:
        """Floating-point operations of one scored pass, two a multiply-add."""
        layer = 4 * self.d_model**2 + 3 * self.d_model * self.d_mlp
        attention = self.d_model * self.length  # QK and PV over half of the keys
        body = self.n_layers * (layer + attention)
        rest = self.d_model * self.vocabulary if head else -self.d_model * self.d_mlp
        return 2.0 * tokens * (body + rest)

    def model(self, device: str) -> Any:
        from transformers import OlmoConfig, OlmoForCausalLM

        torch.manual_seed(0)
        config = OlmoConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=self.length,
        )
        with torch.device(device):
            return OlmoForCausalLM(config).eval().to(torch.bfloat16)


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one run, the device idle before and after."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: str, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(30))
    return 2.0 * size**3 / best


def measure(shape: Shape, device: str, batch: int, rounds: int) -> dict[str, Any]:
    model = shape.model(device)
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

    ways = {"body": body, "ke": score("knowledge_entropy"), "three": score(*THREE)}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, device))
    peak = peak_flops(device, 8192 if device.startswith("cuda") else 512)
    tokens = count * shape.length
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratios": {
            "ke_share_of_peak": shape.flops(tokens, head=False) / middle["ke"] / peak,
            "three_share_of_peak": shape.flops(tokens, head=True) / middle["three"] / peak,
            "ke_over_body": middle["ke"] / middle["body"],
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
    shape = Shape(2, 64, 128, 4, 512, 64) if options.tiny else Shape()
    result = measure(shape, options.device, options.batch, options.rounds)
    for name, value in result["ratios"].items():
        print(f"{name:24s} {value:.3f}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
