"""When does knowledge entropy fall? The demo's series, one setting changed at a time.

    python benchmarks/decay.py map --output runs/decay [--seeds 3] [--dolma FOLDER] [--only NAME …]
    python benchmarks/decay.py table --output runs/decay
    python benchmarks/decay.py learn --output runs/decay

``map`` pretrains ``sweeps/demo_pretrain.yaml`` in each of :data:`SETTINGS` with each seed (of data
and weights) and scores every checkpoint on the same instances of its own training text; what is
there already is skipped, so it may be stopped at any moment. ``table`` prints, for each setting,
where the total has its highest value after the first dip, and the changes from there to the end, in
all and by layer: means over seeds with 95 % Student intervals.

``learn`` runs ``sweeps/demo_continual.yaml`` (twice as long, two seeds, with perplexity on the
pretraining text) from :data:`STAGES` of the demo's setting, from the ends of the three weight
decays, whose series differ in knowledge entropy at one step and on one text, and from the demo's
end resuscitated in each of :data:`RESUSCITATED`. It prints the means over seeds with their
intervals, and the correlation of acquisition and forgetting with knowledge entropy over the stages,
plain and with step and loss held fixed. Results: EXPERIMENTS.md, section 6.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from ke_ray.config import load_study
from ke_ray.core.partial import fixed_columns, partial_correlation
from ke_ray.data.corpus import build_corpus
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.engine.train.continual import run_continual_study
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model
from ke_ray.shipped import study_path
from ke_ray.storage import read_table
from ke_ray.studies.continual import ContinualStudy
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
    "real text": ["data.biographies=null"],
}
#: Settings from which learning starts, and the steps.
STAGES = {
    "demo": (80, 320, 640, 960, 1280, 1600),
    "weight decay 0": (1600,),
    "weight decay 0.5": (1600,),
}
#: Name to keys of ``resuscitation``.
RESUSCITATED: dict[str, dict[str, Any]] = {
    "factor 0.5": {"factor": 0.5},
    "factor 1": {"factor": 1},
    "factor 2": {"factor": 2},
    "random rows, 2": {"factor": 2, "control": "random"},
    "matched norm, 2": {"factor": 2, "control": "matched_norm"},
    "attention temperature 2": {"factor": 2, "control": "attention_temperature"},
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


def learn(folder: Path, name: str, steps: tuple[int, ...], resuscitation: Any = None) -> list[Any]:
    """Rows of continual learning from steps of one series, run unless they are there."""
    world, output = folder / "world", folder / "learn" / name.replace(" ", "_")
    study = load_study(
        study_path("demo_continual"),
        ContinualStudy,
        [
            f"starts.spec={folder}/checkpoints",
            f"starts.nearest={list(steps)}",
            f"corpus.source={world}/other_documents.jsonl.gz",
            "corpus.num_instances=640",
            f"injection.paraphrase={world}/facts_paraphrase.json",
            f"injection.once={world}/facts_once.json",
            f"downstream.own_tasks.biographies={world}/questions.jsonl",
            f"entropy.source={world}/documents.jsonl.gz",
            f"held_out.source={world}/documents.jsonl.gz",
            "held_out.num_instances=128",
            "seeds=[0,1]",
            "executor=inline",
            f"resuscitation={json.dumps(resuscitation)}",
            f"output={output}",
            "mlflow.enabled=false",
        ],
    )
    return list(run_continual_study(study).rows)


def learning(output: Path) -> pd.DataFrame:
    """One row per run from every series that is there."""
    rows = []
    for name, steps in STAGES.items():
        for folder in sorted(output.glob(f"{name.replace(' ', '_')}-[0-9]*")):
            if not (folder / "scores.json").exists():
                continue
            scores = json.loads((folder / "scores.json").read_text())
            losses = {row["step"]: row["loss"] for row in scores}
            runs = [(name, row) for row in learn(folder, "stages", steps)]
            if name == "demo":
                for label, keys in RESUSCITATED.items():
                    resuscitated = learn(folder, label, steps[-1:], {"ratio": 0.5, **keys})
                    runs += [(label, row) for row in resuscitated]
            rows += [
                {
                    "start": f"{label}, step {row['step']}",
                    "series": folder.name,
                    "loss": losses[row["step"]],
                    **row,
                }
                for label, row in runs
            ]
    return pd.DataFrame(rows)


def partial(frame: pd.DataFrame, value: str, by: str, fixed: list[str]) -> float:
    """Correlation of two columns that holds others fixed."""
    x, y, *others = (frame[name].to_numpy(float) for name in (value, by, *fixed))
    return float(partial_correlation(x, y, fixed_columns(np.zeros(len(x)), *others)))


def show_learning(runs: pd.DataFrame) -> None:
    """Print means over series (each the mean of its seeds), and correlations over the stages."""
    runs = runs.assign(
        acquisition=100 * runs["acquisition"],
        forgetting=100 * runs["forgetting"],
        entropy=runs["knowledge_entropy_before_nats"],
        perplexity_change=100 * (runs["perplexity_after"] / runs["perplexity_before"] - 1),
    )
    columns = ["acquisition", "forgetting", "perplexity_change", "entropy", "loss"]
    by_series = runs.groupby(["start", "series"], sort=False)[columns].mean().reset_index()
    table = by_series.groupby("start", sort=False)[columns].agg(lambda x: interval(list(x)))
    print(table.to_markdown())
    stages = by_series[by_series["start"].str.fullmatch(r"demo, step \d+")].copy()
    stages["log_step"] = np.log(stages["start"].str.extract(r"(\d+)$")[0].astype(float))
    for value in ("acquisition", "forgetting", "perplexity_change"):
        plain, held = (
            partial(stages, value, "entropy", fixed) for fixed in ([], ["log_step", "loss"])
        )
        print(
            f"{value} with H over {len(stages)} stages: {plain:+.2f}; step, loss fixed: {held:+.2f}"
        )


def main() -> None:
    """Run or print the map."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["map", "table", "learn"])
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
    if options.what == "learn":
        show_learning(learning(options.output))
    else:
        print(table(options.output).to_markdown(index=False))


if __name__ == "__main__":
    main()
