"""When does knowledge entropy fall? The demo's series, one setting changed at a time.

    python benchmarks/decay.py map --output runs/decay [--seeds 3] [--dolma FOLDER] [--only NAME …]
    python benchmarks/decay.py table --output runs/decay

``map`` pretrains ``sweeps/demo_pretrain.yaml`` in each of :data:`SETTINGS` with each seed (data and
weights) and scores every checkpoint on the same instances of its own training text; what is there
already is skipped, so it may be stopped at any moment. ``table`` prints, for each setting, where the
total has its highest value after the first dip, and the paired changes from there to the end, in all
and by layer: means over seeds with 95 % Student intervals. EXPERIMENTS.md, section 6, has the results.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import t as student

from ke_ray.config import load_study
from ke_ray.data.corpus import build_corpus
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model
from ke_ray.shipped import study_path
from ke_ray.storage import read_table
from ke_ray.studies.training import PretrainStudy
from ke_ray.training.pretrain import run_pretrain

#: Name to the keys that differ from the demo's.
SETTINGS: dict[str, list[str]] = {
    "demo": [],
    "weight decay 0": ["optimizer.weight_decay=0"],
    "weight decay 0.5": ["optimizer.weight_decay=0.5"],
    "learning rate 2.5e-3": ["optimizer.learning_rate=2.5e-3"],
    "learning rate 1e-2": ["optimizer.learning_rate=1e-2"],
    "cosine": ["schedule.name=cosine"],
    "linear to zero": ["schedule.name=linear", "schedule.final_factor=0"],
    "d_mlp 128": ["model.d_mlp=128"],
    "d_mlp 2048": ["model.d_mlp=2048"],
    "batch 4": ["global_batch_size=4"],
    "batch 32": ["global_batch_size=32"],
    "25 people": ["data.biographies.num_people=25"],
    "400 people": ["data.biographies.num_people=400"],
    "real text": ["data.biographies=null"],
}
MEASURES = ("knowledge_entropy", "dormant_share")
NUM_INSTANCES = 256


def run(name: str, seed: int, output: Path, dolma: str | None) -> None:
    """Pretrain and score one setting with one seed, unless it is done."""
    folder = output / f"{name.replace(' ', '_')}-{seed}"
    scores = folder / "scores.json"
    if scores.exists():
        return
    overrides = [*SETTINGS[name], f"seed={seed}", f"output={folder}", "mlflow.enabled=false"]
    source = f"{folder}/world/documents.jsonl.gz"
    if name == "real text":
        source = str(dolma)
        overrides.append(f"data.source={source}")
    else:
        overrides.append(f"data.biographies.seed={seed}")
    study = load_study(study_path("demo_pretrain"), PretrainStudy, overrides)
    outcome = run_pretrain(study)
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    corpus = build_corpus(
        "training",
        source,
        num_instances=NUM_INSTANCES,
        sequence_length=study.sequence_length,
        tokenizer=tokenizer,
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        sampling="spread",
    )
    losses = read_table(f"{folder}/train.parquet").to_pandas().set_index("step")["loss"]
    rows = []
    for step in outcome.checkpoint_steps:
        model = load_model(folder / "checkpoints" / f"step{step}")
        result = score_model(
            model, torch.from_numpy(corpus.input_ids), measures=MEASURES, batch_size=64
        )
        rows.append(
            {
                "step": step,
                "loss": float(losses.loc[max(1, step - 19) : step].mean()) if step else None,
                "dormant_share": result.row("dormant_share").value,
                "stderr": result.row("knowledge_entropy").stderr,
                "total": result.row("knowledge_entropy").value,
                "layers": [
                    result.row("knowledge_entropy", layer=layer).value
                    for layer in range(model.config.num_hidden_layers)
                ],
            }
        )
    scores.write_text(json.dumps(rows))
    print(f"{name}, seed {seed}: " + ", ".join(f"{r['step']}: {r['total']:.3f}" for r in rows))


def peak(rows: list[dict[str, Any]]) -> int:
    """Index of the highest total after the lowest of the first quarter of the checkpoints."""
    dip = min(range(1, len(rows) // 4 + 1), key=lambda i: rows[i]["total"])
    return max(range(dip, len(rows)), key=lambda i: rows[i]["total"])


def interval(values: list[float]) -> str:
    """Mean and 95 % Student interval over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = student.ppf(0.975, len(values) - 1) * math.sqrt(variance / len(values))
    return f"{mean:+.3f} ± {half:.3f}"


def table(output: Path) -> pd.DataFrame:
    """One row per setting."""
    lines = []
    for name in SETTINGS:
        found = sorted(output.glob(f"{name.replace(' ', '_')}-*/scores.json"))
        series = [json.loads(path.read_text()) for path in found]
        if not series:
            continue
        peaks = [rows[peak(rows)] for rows in series]
        ends = [rows[-1] for rows in series]
        line: dict[str, Any] = {
            "setting": name,
            "seeds": len(series),
            "peak at": ", ".join(str(row["step"]) for row in peaks),
            "H at the peak": f"{sum(row['total'] for row in peaks) / len(peaks):.3f}",
        }
        both = list(zip(peaks, ends, strict=True))
        line["peak to end"] = interval([end["total"] - top["total"] for top, end in both])
        for layer in range(len(ends[0]["layers"])):
            changes = [end["layers"][layer] - top["layers"][layer] for top, end in both]
            line[f"layer {layer}"] = interval(changes)
        line["dormant share"] = f"{sum(row['dormant_share'] for row in ends) / len(ends):.3f}"
        line["loss"] = f"{sum(row['loss'] for row in ends) / len(ends):.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def main() -> None:
    """Run or print the map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["map", "table"])
    parser.add_argument("--output", type=Path, default=Path("runs/decay"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dolma", help="documents for 'real text'; without it, left out")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="these settings")
    options = parser.parse_args()
    if options.what == "map":
        for seed in range(options.seeds):
            for name in options.only or SETTINGS:
                if name != "real text" or options.dolma:
                    run(name, seed, options.output, options.dolma)
    print(table(options.output).to_markdown(index=False))


if __name__ == "__main__":
    main()
