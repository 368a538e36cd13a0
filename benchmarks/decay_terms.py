"""Which term of knowledge entropy falls? The series of ``decay.py``, split into token and memory.

    python benchmarks/decay_terms.py --output runs/decay [--only NAME …]

Scores four checkpoints of every series that is there, on the instances of ``decay.py``: the first,
the lowest of the first dip, the highest after it, and the last. It prints, for each setting, the
changes of knowledge entropy, of the entropy of single tokens and of the information between token
and memory, whose sum knowledge entropy is (docs/science.md, single tokens): means over seeds with
95 % Student intervals. Finished series are skipped. Results: EXPERIMENTS.md, section 8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from decay import SETTINGS, dip, interval, peak, series_of, training_text

from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model

TERMS = ("knowledge_entropy", "token_entropy", "memory_information")


def score(folder: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Terms at the first, lowest, highest and last checkpoint of one series, kept in terms.json."""
    path = folder / "terms.json"
    if not path.exists():
        text = training_text(folder)
        moments = {"first": rows[0], "dip": rows[dip(rows)], "peak": rows[peak(rows)]}
        scored = {}
        for moment, row in {**moments, "last": rows[-1]}.items():
            model = load_model(folder / "checkpoints" / f"step{row['step']}")
            result = score_model(model, text, measures=TERMS, batch_size=64)
            scored[moment] = {term: result.row(term).value for term in TERMS}
            assert abs(scored[moment]["knowledge_entropy"] - row["total"]) < 1e-4, (folder, row)
        path.write_text(json.dumps(scored))
    kept: dict[str, dict[str, float]] = json.loads(path.read_text())
    return kept


def table(output: Path, settings: list[str]) -> pd.DataFrame:
    """Changes between two moments, per setting; rises of series that have not fallen yet too."""
    lines = []
    for name in settings:
        scored = [score(folder, rows) for folder, rows in series_of(output, name)]
        for first, last in (("first", "peak"), ("dip", "peak"), ("peak", "last")) if scored else ():
            changes = {
                term: interval([moments[last][term] - moments[first][term] for moments in scored])
                for term in TERMS
            }
            lines.append({"setting": name, "change": f"{first} to {last}", **changes})
    return pd.DataFrame(lines)


def main() -> None:
    """Score what is missing and print the changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/decay"))
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="these settings")
    options = parser.parse_args()
    print(table(options.output, options.only or list(SETTINGS)).to_markdown(index=False))


if __name__ == "__main__":
    main()
