"""Does learning follow knowledge entropy? Continual learning from the series of ``decay.py``.

    python benchmarks/decay_learning.py --output runs/decay

Runs ``sweeps/demo_continual.yaml`` (twice as long, two seeds, with perplexity on the pretraining
text) from :data:`STAGES`: the stages of the demo's setting and of the most skewed text, the ends of
settings that differ from the demo's in knowledge entropy at one step, and the ends of :data:`WHOLE`
resuscitated. It prints means over series (each the mean of its
seeds) with 95 % Student intervals, differences of starts series by series, and the correlations
with knowledge entropy over the stages. Finished runs are skipped. Results: EXPERIMENTS.md,
sections 7 and 8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from decay import interval, series_of

from ke_ray.config import load_study
from ke_ray.core.intervals import fisher_interval
from ke_ray.core.partial import fixed_columns, partial_correlation
from ke_ray.engine.train.continual import run_continual_study
from ke_ray.shipped import study_path
from ke_ray.storage import read_table
from ke_ray.studies.continual import ContinualStudy

#: Settings from which learning starts, and the steps.
STAGES = {
    "demo": (80, 320, 640, 960, 1280, 1600),
    "weight decay 0": (1600,),
    "weight decay 0.5": (1600,),
    "skew 0.5": (1600,),
    "skew 1": (1600,),
    "skew 1.5": (80, 320, 640, 1600),
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
#: Settings with several stages, and in what ways their last checkpoint is resuscitated.
WHOLE = {
    "demo": tuple(RESUSCITATED),
    "skew 1.5": ("factor 1", "random rows, 2", "factor 2", "matched norm, 2"),
}
#: Seeds of the training order, where they are not (0, 1).
TRAINING_SEEDS = dict.fromkeys(("skew 0.5", "skew 1", "skew 1.5"), (0,))
OUTCOMES = [
    "acquisition",
    "acquisition_vs_original",
    "forgetting",
    "perplexity_change",
    "entropy_change",
]
END = "step 1600"
#: Starts to set side by side, series by series.
COMPARED = [
    ("weight decay 0, step 1600", "weight decay 0.5, step 1600"),
    *((f"demo, {END}", f"skew {skew}, {END}") for skew in ("0.5", "1", "1.5")),
    ("skew 1.5, step 320", "skew 1.5, step 1600"),
    *((f"{name}, {END}", f"{name}, {label}, {END}") for name in WHOLE for label in WHOLE[name]),
]


def learn(
    folder: Path,
    name: str,
    steps: tuple[int, ...],
    resuscitation: Any,
    *,
    seeds: tuple[int, ...],
    finished: bool,
) -> list[Any]:
    """Rows of continual learning from steps of one series, run unless they are there.

    With ``finished`` nothing is run; what is not finished has no rows.
    """
    world, output = folder / "world", folder / "learn" / name.replace(" ", "_")
    manifest = output / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["status"] == "finished":
        table: list[Any] = read_table(f"{output}/runs.parquet").to_pylist()
        return table
    if finished:
        return []
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
            f"seeds={list(seeds)}",
            "executor=inline",
            f"resuscitation={json.dumps(resuscitation)}",
            f"output={output}",
            "mlflow.enabled=false",
        ],
    )
    return list(run_continual_study(study).rows)


def learning(output: Path, *, finished: bool = False) -> pd.DataFrame:
    """One row per run from every series that is there; the stages of all of them come first."""
    starts: list[tuple[str, str, tuple[int, ...]]] = [
        *((name, "", steps) for name, steps in STAGES.items()),
        *((name, label, STAGES[name][-1:]) for label in RESUSCITATED for name in WHOLE),
    ]
    rows = []
    for name, label, steps in starts:
        if label and label not in WHOLE[name]:
            continue
        keys = {"ratio": 0.5, **RESUSCITATED[label]} if label else None
        for folder, scores in series_of(output, name):
            losses = {row["step"]: row["loss"] for row in scores}
            rows += [
                {
                    "setting": name,
                    "start": f"{name}, {label}{', ' if label else ''}step {row['step']}",
                    "is_stage": not label,
                    "seed_of_series": int(folder.name.rsplit("-", 1)[1]),
                    "loss": losses[row["step"]],
                    **row,
                }
                for row in learn(
                    folder,
                    label or "stages",
                    steps,
                    keys,
                    seeds=TRAINING_SEEDS.get(name, (0, 1)),
                    finished=finished,
                )
            ]
    return pd.DataFrame(rows)


def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """The outcomes of runs: shares and changes in per cent, H and its change in nats."""
    return runs.assign(
        acquisition=100 * runs["acquisition"],
        # Of an unchanged start both are the same.
        acquisition_vs_original=100 * runs["acquisition_vs_original"].fillna(runs["acquisition"]),
        forgetting=100 * runs["forgetting"],
        perplexity_change=100 * (runs["perplexity_after"] / runs["perplexity_before"] - 1),
        entropy=runs["knowledge_entropy_before_nats"],
        entropy_change=runs["knowledge_entropy_after_nats"] - runs["knowledge_entropy_before_nats"],
    )


def means_of_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per start of one series, the mean of its runs."""
    by = ["setting", "start", "is_stage", "seed_of_series", "step"]
    return runs.groupby(by, sort=False)[[*OUTCOMES, "entropy", "loss"]].mean().reset_index()


def pairs(runs: pd.DataFrame, first: str, second: str) -> pd.Series:
    """Intervals over series of what runs from the second start have more than from the first.

    Runs of the same series and training seed are subtracted, then averaged over training seeds.
    """
    columns = [*OUTCOMES, "entropy"]
    by_start = runs.set_index(["start", "seed_of_series", "seed"])[columns]
    difference = (by_start.loc[second] - by_start.loc[first]).dropna(how="all")
    means = difference.groupby("seed_of_series")[columns].mean()
    return means.agg(lambda values: interval(list(values)))


def correlations(stages: pd.DataFrame, outcome: str) -> str:
    """Correlation of an outcome with H over stages: within series, then step and loss held fixed.

    Intervals are Fisher's, as if starts were independent.
    """
    x, y, loss = (stages[name].to_numpy(float) for name in ("entropy", outcome, "loss"))
    series = (stages["setting"] + stages["seed_of_series"].astype(str)).to_numpy()
    cells = []
    for others in ([], [np.log(stages["step"].to_numpy(float)), loss]):
        fixed = fixed_columns(series, *others)
        r = float(partial_correlation(x, y, fixed))
        low, high = fisher_interval(r, len(x) - 1 - int(np.linalg.matrix_rank(fixed)))
        cells.append(f"{r:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "; step and loss fixed: ".join(cells)


def main() -> None:
    """Run what is missing and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/decay"))
    parser.add_argument("--finished", action="store_true", help="run nothing; print what is there")
    options = parser.parse_args()
    runs = measured(learning(options.output, finished=options.finished))
    means = means_of_seeds(runs)
    columns = [*OUTCOMES, "entropy", "loss"]
    shown = means.groupby("start", sort=False)[columns].agg(lambda x: interval(list(x)))
    print(shown.to_markdown())
    starts = set(means["start"])
    compared = {
        f"{second} − {first}": pairs(runs, first, second)
        for first, second in COMPARED
        if {first, second} <= starts
    }
    print(pd.DataFrame(compared).T.to_markdown())
    stages = means[means["is_stage"]]
    for name in WHOLE:
        chosen = stages[stages["setting"] == name]
        for outcome in OUTCOMES if len(chosen) else ():
            print(f"{name}, {len(chosen)} stages, {outcome}: {correlations(chosen, outcome)}")
    both = stages[stages["setting"].isin(WHOLE)]
    for outcome in OUTCOMES:
        print(f"all {len(both)} stages, {outcome}: {correlations(both, outcome)}")


if __name__ == "__main__":
    main()
