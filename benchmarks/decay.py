"""When does knowledge entropy fall? The demo's series, one setting changed at a time.

    python benchmarks/decay.py map --output runs/decay [--seeds 3] [--dolma FOLDER] [--only NAME …]
    python benchmarks/decay.py table --output runs/decay

``map`` pretrains ``sweeps/demo_pretrain.yaml`` in each of :data:`SETTINGS` with each seed (of data
and weights) and scores every checkpoint on the same instances of its own training text; what is
there already is skipped, so it may be stopped at any moment. ``table`` prints, for each setting,
where the total has its highest value after the first dip, and the changes from there to the end, in
all and by layer: means over seeds with 95 % Student intervals. ``decay_terms.py`` splits knowledge
entropy into its two terms in these series, ``decay_learning.py`` continues from their checkpoints.
Results: EXPERIMENTS.md, sections 6 to 8.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from ke_ray.config import load_study
from ke_ray.data.biographies import document_counts
from ke_ray.data.corpus import build_corpus
from ke_ray.data.documents import iter_documents
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
    "skew 0.5": ["data.biographies.skew=0.5"],
    "skew 1": ["data.biographies.skew=1"],
    "skew 1.5": ["data.biographies.skew=1.5"],
    "15 documents": ["data.biographies.documents_per_person=15"],
    "240 documents": ["data.biographies.documents_per_person=240"],
    "d_model 16": ["model.d_model=16", "model.d_mlp=256"],
    "d_model 64": [
        "model.d_model=64",
        "model.d_mlp=1024",
        "num_steps=2240",
        "checkpoints.steps=[0,20,40,80,160,240,320,480,640,960,1280,1600,2240]",
    ],
    "real text": ["data.biographies=null"],
    "real text, few": ["data.biographies=null"],
    "real text, few, skew 1.5": ["data.biographies=null"],
}
#: Skew of the settings whose text is a few real documents, each of them many times.
FEW = {"real text, few": 0.0, "real text, few, skew 1.5": 1.5}
NUM_FEW, MEAN_COPIES, FEW_CHARACTERS = 100, 10, 4000
MEASURES = ("knowledge_entropy", "dormant_share")
NUM_INSTANCES = 256


def run(name: str, seed: int, output: Path, dolma: str | None) -> None:
    """Pretrain and score one setting with one seed, unless it is done."""
    folder = output / f"{name.replace(' ', '_')}-{seed}"
    scores = folder / "scores.json"
    if scores.exists():
        return
    if name.startswith("real text") and not dolma:
        return
    overrides = [*SETTINGS[name], f"seed={seed}", f"output={folder}", "mlflow.enabled=false"]
    if name in FEW:
        dolma = write_few(str(dolma), Path(f"{folder}.jsonl.gz"), skew=FEW[name], seed=seed)
    overrides.append(
        f"data.source={dolma}" if name.startswith("real text") else f"data.biographies.seed={seed}"
    )
    study = load_study(study_path("demo_pretrain"), PretrainStudy, overrides)
    outcome = run_pretrain(study)
    rows_of_text = training_text(folder)
    losses = read_table(f"{folder}/train.parquet").to_pandas().set_index("step")["loss"]
    rows = []
    for step in outcome.checkpoint_steps:
        model = load_model(folder / "checkpoints" / f"step{step}")
        result = score_model(model, rows_of_text, measures=MEASURES, batch_size=64)
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


def write_few(dolma: str, path: Path, *, skew: float, seed: int) -> str:
    """Write 100 long real documents, 1,000 copies in all in proportion to 1 / rank**skew; its path.

    What skew of people is to biographies: how often the same text comes, at one amount of it.
    """
    long = (text for text, _ in iter_documents(dolma) if len(text) >= FEW_CHARACTERS // 2)
    pool = list(itertools.islice(long, 20 * NUM_FEW))
    generator = np.random.Generator(np.random.PCG64([seed, 6]))
    drawn = generator.permutation(len(pool))[:NUM_FEW]
    copies = np.repeat(drawn, document_counts(NUM_FEW, MEAN_COPIES, skew))
    lines = (
        json.dumps({"id": f"{index}-{number}", "text": pool[index][:FEW_CHARACTERS]})
        for number, index in enumerate(generator.permutation(copies))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return str(path)


def training_text(folder: Path) -> torch.Tensor:
    """Instances spread over the text that a series was trained on, [256, T]."""
    config = json.loads((folder / "manifest.json").read_text())["config"]
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    corpus = build_corpus(
        "training",
        config["data"]["source"] or f"{folder}/world/documents.jsonl.gz",
        num_instances=NUM_INSTANCES,
        sequence_length=config["sequence_length"],
        tokenizer=tokenizer,
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        sampling="spread",
    )
    return torch.from_numpy(corpus.input_ids)


def series_of(output: Path, name: str) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Folder and scores of each seed of a setting that is there."""
    found = sorted(output.glob(f"{name.replace(' ', '_')}-[0-9]*/scores.json"))
    return [(path.parent, json.loads(path.read_text())) for path in found]


def dip(rows: list[dict[str, Any]]) -> int:
    """Index of the lowest total of the first quarter of the checkpoints, the untrained aside."""
    return min(range(1, len(rows) // 4 + 1), key=lambda i: rows[i]["total"])


def peak(rows: list[dict[str, Any]]) -> int:
    """Index of the highest total after the first dip."""
    return max(range(dip(rows), len(rows)), key=lambda i: rows[i]["total"])


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
        series = [rows for _, rows in series_of(output, name)]
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
                run(name, seed, options.output, options.dolma)
    print(table(options.output).to_markdown(index=False))


if __name__ == "__main__":
    main()
