"""The error of bfloat16: knowledge entropy of small trained models in both dtypes, on the CPU.

    python benchmarks/precision.py [--json] [--steps 300] [--instances 64]

Two families are trained on real text (`$KE_RAY_REFERENCE_DATA/data/dolma_sample`), one with a
gated FFN (OLMo) and one with an ungated one (GPT-NeoX), and kept at eight steps. Each checkpoint is
scored on other text (`c4_sample`) in float32 and in bfloat16. The error is the difference of the
totals over layers. As a share of the upper bound L · ln m it is compared with the paper's effect, a
change by 0.4 nats of 144 between OLMo-1B's checkpoints. A scan compares checkpoints with each
other, so what counts is the error of a change: the largest difference of two checkpoints' errors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ke_ray.core.measures import Evaluation
from ke_ray.data.corpus import build_corpus
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model
from ke_ray.studies.training import PretrainStudy
from ke_ray.training.pretrain import run_pretrain

FAMILIES = ("olmo", "gpt_neox")
LENGTH = 128
EFFECT = 0.4 / 144  # of the paper, as a share of L · ln m


def train(family: str, folder: Path, steps: int, data: Path) -> list[Path]:
    """Train a small model of a family; its checkpoints in order."""
    study = {
        "model": {"model_type": family, "n_layers": 4, "d_model": 96, "d_mlp": 384, "n_heads": 4},
        "data": {"source": str(data / "dolma_sample" / "*.jsonl.gz"), "vocab_size": 2048},
        "sequence_length": LENGTH,
        "global_batch_size": 16,
        "num_steps": steps,
        "optimizer": {"learning_rate": 6e-3, "weight_decay": 0.1},
        "checkpoints": {"number": 8, "spacing": "log", "first": max(1, steps // 32)},
        "output": str(folder),
        "mlflow": {"enabled": False},
    }
    run_pretrain(PretrainStudy.model_validate(study))
    found = (folder / "checkpoints").glob("step*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step")))


def entropies(checkpoint: Path, ids: Any, dtype: torch.dtype) -> list[float]:
    """Knowledge entropy of each layer, nats."""
    evaluation: Evaluation = score_model(load_model(checkpoint, dtype=dtype), ids, batch_size=8)
    return [row.value for row in evaluation.rows if row.layer is not None]


def measure(family: str, folder: Path, steps: int, instances: int, data: Path) -> dict[str, float]:
    """Errors of a family, in nats and as shares."""
    checkpoints = train(family, folder, steps, data)
    corpus = build_corpus(
        "c4",
        str(data / "c4_sample" / "*.jsonl.gz"),
        num_instances=instances,
        sequence_length=LENGTH,
        tokenizer=load_tokenizer(str(checkpoints[0])),
        eos_token_id=0,
    )
    full, short = (
        torch.tensor([entropies(path, corpus.input_ids, dtype) for path in checkpoints])
        for dtype in (torch.float32, torch.bfloat16)
    )
    errors = short - full  # [checkpoints, layers]
    totals, bound = errors.sum(dim=1), full.shape[1] * math.log(384)
    change = float(totals.max() - totals.min())
    return {
        "total_nats": float(full[-1].sum()),
        "change_over_training_nats": float(full.sum(dim=1).max() - full.sum(dim=1).min()),
        "largest_error_of_a_layer_nats": float(errors.abs().max()),
        "largest_error_of_a_total_nats": float(totals.abs().max()),
        "error_of_a_change_nats": change,
        "total_of_the_papers_effect": float(totals.abs().max()) / bound / EFFECT,
        "change_of_the_papers_effect": change / bound / EFFECT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--instances", type=int, default=64)
    options = parser.parse_args()
    data = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared")) / "data"
    results = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            results[family] = measure(
                family, Path(folder) / "run", options.steps, options.instances, data
            )
        for name, value in results[family].items():
            print(f"{family}: {name} {value:.3g}", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
