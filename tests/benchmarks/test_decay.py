"""What the decay experiments read off a series: dip, peak, fall, slope, and repeated real text."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import decay
import decay_learning
import decay_sizes
import pandas as pd
import pytest


def rows(*totals: float) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "total": total} for number, total in enumerate(totals)]


SERIES = rows(12.4, 11.9, 11.8, 12.1, 12.3, 12.2, 12.25, 12.0)


def test_the_peak_is_the_highest_total_after_the_dip_not_the_untrained_start() -> None:
    assert (decay.dip(SERIES), decay.peak(SERIES)) == (2, 4)


def test_a_series_that_rises_to_its_end_has_not_fallen() -> None:
    rising = rows(12.4, 11.9, 11.8, 12.1, 12.2, 12.3, 12.35, 12.4)
    assert decay.peak(rising) == 7
    assert decay_sizes.fall(rising, 7) == 0.0


def test_a_fall_counts_from_the_highest_so_far_since_the_dip() -> None:
    falls = [decay_sizes.fall(SERIES, index) for index in range(len(SERIES))]
    assert falls == pytest.approx([0, 0, 0, 0, 0, -0.1, -0.05, -0.3])


@pytest.mark.parametrize(("steps", "exponent"), [((80, 320, 1280), 1.0), ((320, 320, 320), 0.0)])
def test_the_slope_tells_tokens_per_weight_from_steps(
    steps: tuple[int, ...], exponent: float
) -> None:
    weights = (26_624, 106_496, 425_984)
    assert decay_sizes.slope(weights, steps)[0] == pytest.approx(exponent)


def test_repeated_real_text_has_as_many_copies_whatever_their_skew(tmp_path: Path) -> None:
    source = tmp_path / "documents.jsonl"
    texts = [f"Document {number}. " * 200 for number in range(300)]
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    counts = {}
    for skew in (0.0, 1.5):
        path = decay.write_few(str(source), tmp_path / f"few{skew}.jsonl.gz", skew=skew, seed=3)
        with gzip.open(path, "rt") as file:
            counts[skew] = Counter(json.loads(line)["text"] for line in file)
    assert {sum(count.values()) for count in counts.values()} == {1000}
    assert set(counts[0.0].values()) == {10}
    assert set(counts[0.0]) == set(counts[1.5]), "the same documents"
    assert max(counts[1.5].values()) > 300


def test_starts_are_compared_series_by_series_and_by_the_same_training_seed() -> None:
    """A level of its own for each series and for each training seed drops out of the difference."""
    levels = {(series, seed): 4.0 * series + 9.0 * seed for series in range(3) for seed in (0, 1)}
    runs = pd.DataFrame(
        [
            {"start": start, "seed_of_series": series, "seed": seed, "entropy": 12.0 - gain / 20}
            | dict.fromkeys(decay_learning.OUTCOMES, level + gain)
            for start, gain, seeds in (("first", 0.0, (0, 1)), ("second", 2.0, (0,)))
            for (series, seed), level in levels.items()
            if seed in seeds
        ]
    )
    found = decay_learning.pairs(runs, "first", "second")
    assert found["acquisition"] == "+2.000 ± 0.000"
    assert found["entropy"] == "-0.100 ± 0.000"
