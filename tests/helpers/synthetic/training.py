"""Folders of continual learning, sweeps and pretraining, from simulated runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ke_ray.results.sweep_folder import settings_rows, settings_table
from synthetic.files import manifest, write

LEVELS = {"memorization": 0.0, "semantic": -0.6, "compositional": -1.0}


def simulate_run(rng, *, plasticity: float, num_steps: int, injections: list[int]) -> dict:
    """Log probabilities per token of 12 paragraphs over training; facts stick by ``plasticity``."""
    paragraphs = rng.normal(-3.0, 0.3, size=12)
    steps = list(range(0, num_steps + 1, max(1, num_steps // 20)))
    path = {}
    for setting, gain in (("once", 0.5), ("paraphrase", 1.0)):
        for level, offset in LEVELS.items():
            series = []
            for step in steps:
                heard = [step - t for t in injections if t < step]
                memory = sum(plasticity * gain * np.exp(-age / (2 * num_steps)) for age in heard)
                series.append(float((paragraphs + offset).mean() + 0.1 * memory))
            path[setting, level] = series
    before = np.mean([values[0] for values in path.values()])
    after_items = paragraphs + 0.1 * plasticity * len(injections)
    boots = [
        (lambda i: (after_items[i].mean() - paragraphs[i].mean()) / abs(paragraphs[i].mean()))(
            rng.integers(0, 12, 12)
        )
        for _ in range(200)
    ]
    acquisition = (after_items.mean() - paragraphs.mean()) / abs(paragraphs.mean())
    correct_before = rng.random(400) < 0.55
    correct_after = rng.random(400) < 0.55 - 0.05 * (1.5 - plasticity)
    p0, p1 = correct_before.mean(), correct_after.mean()
    return {
        "steps": steps,
        "path": path,
        "row": {
            "acquisition": float(acquisition),
            "acquisition_low": float(np.quantile(boots, 0.025)),
            "acquisition_high": float(np.quantile(boots, 0.975)),
            "acquisition_summed": float(acquisition * 1.1),
            "forgetting": float((p0 - p1) / p0),
            "forgetting_low": float((p0 - p1) / p0 - 0.06),
            "forgetting_high": float((p0 - p1) / p0 + 0.06),
            "probe_logprob_before": float(before),
            "probe_logprob_after": float(np.mean([values[-1] for values in path.values()])),
            "downstream_before": float(p0),
            "downstream_after": float(p1),
            "perplexity_before": float(np.exp(3.0)),
            "perplexity_after": float(np.exp(3.0 + 0.2 * (1.5 - plasticity))),
            "knowledge_entropy_before_nats": 13.0 + 2.0 * plasticity,
            "knowledge_entropy_after_nats": 12.9 + 1.9 * plasticity,
            "num_steps": num_steps,
            "num_tokens": num_steps * 16 * 128,
            "duration_s": 12.5,
            "final_checkpoint": None,
            "mlflow_run_id": None,
        },
    }


def make_continual(
    folder: Path,
    *,
    steps: tuple[int, ...] = (40, 160, 640),
    seeds: tuple[int, ...] = (0, 1),
    failed: tuple[str, ...] = (),
    config: dict | None = None,
) -> Path:
    """A continual-learning folder whose later starts learn less and forget more."""
    rng = np.random.default_rng(7)
    num_steps, injections = 100, [10, 30, 50, 70, 90]
    runs, probes, train, inject, downstream, perplexity, dynamics = [], [], [], [], [], [], []
    for place, step in enumerate(steps):
        for seed in seeds:
            run = f"step{step}-seed{seed}"
            plasticity = 1.4 - 0.8 * place / max(1, len(steps) - 1) + 0.05 * rng.normal()
            made = simulate_run(
                rng, plasticity=plasticity, num_steps=num_steps, injections=injections
            )
            runs.append(
                {
                    "run": run,
                    "checkpoint": f"step{step}",
                    "step": step,
                    "seed": seed,
                    "corpus": "clinic_notes",
                    "resuscitation_ratio": None,
                    "amplifying_factor": None,
                    "control": None,
                    "status": "ok",
                    "error": None,
                    **made["row"],
                }
            )
            for (setting, level), values in made["path"].items():
                probes += [
                    {
                        "run": run,
                        "step": at,
                        "setting": setting,
                        "level": level,
                        "num_probes": 30,
                        "logprob_per_token": value,
                        "logprob_summed": 4 * value,
                    }
                    for at, value in zip(made["steps"], values, strict=True)
                ]
            train += [
                {
                    "run": run,
                    "step": at,
                    "num_tokens": at * 2048,
                    "loss": float(5 - 1.2 * np.log1p(at) / 5 + 0.05 * rng.normal()),
                    "learning_rate": 4e-4 * (1 - 0.9 * at / num_steps),
                    "grad_norm": 1.0,
                    "tokens_per_s": 9000.0,
                    "elapsed_s": 0.1 * at,
                }
                for at in range(1, num_steps + 1)
            ]
            inject += [
                {
                    "run": run,
                    "step": at,
                    "row": row,
                    "setting": "once" if row == 5 else "paraphrase",
                    "instance": row,
                    "version": place_,
                    "num_tokens": 60,
                }
                for place_, at in enumerate(injections)
                for row in range(6)
            ]
            downstream += [
                {
                    "run": run,
                    "when": when,
                    "task": "biography_choice",
                    "metric": "acc",
                    "value": made["row"][f"downstream_{when}"],
                    "stderr": 0.025,
                    "num_items": 400,
                }
                for when in ("before", "after")
            ]
            perplexity += [
                {
                    "run": run,
                    "when": when,
                    "corpus": "biographies",
                    "perplexity": made["row"][f"perplexity_{when}"],
                    "nats_per_token": float(np.log(made["row"][f"perplexity_{when}"])),
                    "num_tokens": 20000,
                }
                for when in ("before", "after")
            ]
            dynamics += [
                {"run": run, "injection": i, "step": at, "effectivity": 0.1 * plasticity}
                for i, at in enumerate(injections)
            ]
    runs += [
        {"run": name, "checkpoint": name, "status": "failed", "error": f"{name}: loss not finite"}
        for name in failed
    ]
    write(folder / "runs.parquet", runs)
    for name, rows in (
        ("probes", probes),
        ("train", train),
        ("injections", inject),
        ("downstream", downstream),
        ("perplexity", perplexity),
        ("dynamics", dynamics),
    ):
        write(folder / f"{name}.parquet", rows)
    manifest(folder, "continual", config=config or {})
    return folder


def make_sweep(folder: Path, *, failed: int = 1) -> Path:
    """Ratio × factor with controls at (0.5, 2) and the original; some trials failed."""
    rng = np.random.default_rng(11)
    rows = []
    settings: list[tuple[float | None, float | None, str | None]] = [(None, None, None)]
    settings += [(r, q, None) for r in (0.25, 0.5, 0.75) for q in (0.5, 1.0, 2.0)]
    settings += [(0.5, 2.0, "random"), (0.5, 2.0, "matched_norm")]
    for number, (ratio, factor, control) in enumerate(settings):
        for seed in (0, 1):
            plasticity = 0.6 + 0.25 * (ratio or 0) * np.log2(factor or 1) * (
                0.3 if control else 1.0
            )
            made = simulate_run(
                rng, plasticity=plasticity, num_steps=100, injections=[10, 30, 50, 70, 90]
            )
            rows.append(
                {
                    "trial_id": f"t{number:02d}s{seed}",
                    "point": number,
                    "status": "ok",
                    "error": None,
                    "resuscitate.ratio": ratio,
                    "resuscitate.factor": factor,
                    "checkpoint": "step640",
                    "step": 640,
                    "seed": seed,
                    "corpus": "clinic_notes",
                    "resuscitation_ratio": ratio,
                    "amplifying_factor": factor,
                    "control": control,
                    **made["row"],
                }
            )
    rows += [
        {
            "trial_id": f"x{i}",
            "point": len(settings) + i,
            "status": "failed",
            "error": "worker killed by signal 9",
        }
        for i in range(failed)
    ]
    write(folder / "trials.parquet", rows)
    swept = ("resuscitate.ratio", "resuscitate.factor", "control")
    points = [{**row, "params": {key: row.get(key) for key in swept}} for row in rows]
    objectives = [("acquisition", "maximize"), ("forgetting", "minimize")]
    pq.write_table(settings_table(settings_rows(points, objectives)), folder / "settings.parquet")
    manifest(folder, "sweep", search={"method": "grid"}, objectives={"acquisition": "max"})
    return folder


def make_pretrain(folder: Path) -> Path:
    """The loss of a pretraining run."""
    rng = np.random.default_rng(2)
    rows = [
        {
            "run": "pretrain",
            "step": step,
            "num_tokens": step * 4096,
            "loss": float(3 + 4 * np.exp(-step / 120) + 0.05 * rng.normal()),
            "learning_rate": 1e-3 * min(1.0, step / 40),
            "grad_norm": 1.0,
            "tokens_per_s": 20000.0,
            "elapsed_s": 0.2 * step,
        }
        for step in range(1, 641)
    ]
    write(folder / "train.parquet", rows)
    manifest(folder, "pretrain", n_layers=4, d_mlp=64)
    return folder
