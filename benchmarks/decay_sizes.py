"""Tokens per parameter: is it what decides when knowledge entropy falls? Sizes × tokens, crossed.

    python benchmarks/decay_sizes.py --output runs/decay

Reads the scores of :data:`SIZES` of ``decay.py``, each of four times the weights of the one before.
It prints, for each size and :data:`STEPS`, which are a factor of four apart too, the tokens per
weight, the share of its ceiling that knowledge entropy has, and how far it is below the highest
value so far after the first dip (``fall``); and the slope of ln(step of the peak) over ln(weights):
1 where peaks come at one number of tokens per weight, 0 where they come at one step. Means over
seeds with 95 % Student intervals. Results: EXPERIMENTS.md, section 8.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from decay import dip, interval, peak, series_of
from numpy.typing import ArrayLike
from scipy.stats import linregress
from scipy.stats import t as student

SIZES = ("d_model 16", "demo", "d_model 64")
STEPS = (80, 320, 1280)


def size(folder: Path) -> tuple[int, int, float]:
    """Weights without embeddings, tokens per step, and the ceiling of knowledge entropy in nats."""
    config = json.loads((folder / "manifest.json").read_text())["config"]
    shape = config["model"]
    weights = shape["n_layers"] * (4 * shape["d_model"] + 3 * shape["d_mlp"]) * shape["d_model"]
    ceiling = shape["n_layers"] * math.log(shape["d_mlp"])
    return weights, config["global_batch_size"] * config["sequence_length"], ceiling


def fall(rows: list[dict[str, Any]], index: int) -> float:
    """H of a checkpoint minus the highest so far since the first dip; 0 before the dip."""
    since = [row["total"] for row in rows[dip(rows) : index + 1]]
    return float(rows[index]["total"] - max(since)) if since else 0.0


def slope(weights: ArrayLike, steps: ArrayLike) -> tuple[float, float]:
    """Slope of ln(step) over ln(weights), and half of its 95 % interval (least squares)."""
    fit = linregress(np.log(np.asarray(weights, float)), np.log(np.asarray(steps, float)))
    return float(fit.slope), float(student.ppf(0.975, len(np.atleast_1d(steps)) - 2) * fit.stderr)


def main() -> None:
    """Print the table and the slope."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/decay"))
    output = parser.parse_args().output
    lines, peaks = [], []
    for name in SIZES:
        series = series_of(output, name)
        for folder, rows in series:
            peaks.append((size(folder)[0], rows[peak(rows)]["step"]))
        steps = [row["step"] for row in series[0][1]] if series else []
        for step in (step for step in (*STEPS, *steps[-1:]) if step in steps):
            weights, tokens, ceiling = size(series[0][0])
            index = steps.index(step)
            totals = [rows[index]["total"] for _, rows in series]
            lines.append(
                {
                    "setting": name,
                    "weights": weights,
                    "step": step,
                    "tokens per weight": f"{step * tokens / weights:.1f}",
                    "of the ceiling": f"{sum(totals) / len(totals) / ceiling:.4f}",
                    "fall, nats": interval([fall(rows, index) for _, rows in series]),
                    "loss": f"{sum(rows[index]['loss'] for _, rows in series) / len(series):.2f}",
                }
            )
    print(pd.DataFrame(lines).to_markdown(index=False))
    print("peaks at", peaks)
    exponent, half = slope(*zip(*peaks, strict=True))
    print(f"slope of ln(peak's step) over ln(weights): {exponent:+.2f} ± {half:.2f}")


if __name__ == "__main__":
    main()
