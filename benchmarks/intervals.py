"""Are the intervals of a report true? How often 95 % intervals hold what they are an estimate of.

    python benchmarks/intervals.py [--sets 2000] [--json]

Each case is a population with a known value and the package's own interval of samples of one size
that studies have: the paper's, those of ``sweeps/dolma_sample_*`` and of the demo. Printed are how
often the interval holds the value, and how often it lies above and below it. Results and what they
changed: docs/science.md, error bars. (Jackknife errors of scans: ``coverage.py``.)

Populations: ℓ of a paragraph before is −Gamma (mean 3 nats, standard deviation 1.5), its gain is
Gamma with shape 1.5 (skewed: few paragraphs are learned well), mean 0.6 nats for paraphrase and 0.2
for once paragraphs, plus normal noise of 0.15. Items are right before with a given probability;
right ones are lost, wrong ones won with others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np

from ke_ray.core.acquisition import TaskScore, acquisition_interval, forgetting_interval
from ke_ray.core.dynamics import dynamics, effectivity_intervals
from ke_ray.core.intervals import fisher_interval, student_interval, wilson_interval
from ke_ray.core.jackknife import critical_t, group_sizes, standard_error
from ke_ray.core.partial import fixed_columns, partial_correlation
from ke_ray.report.correlation import correlate

Draw = Callable[[np.random.Generator], tuple[float, float]]  # → the ends of an interval
Case = tuple[float, Draw]  # the true value, and how to draw an interval of it

SIX_TASKS = (0.7, 0.5, 0.45, 0.6, 0.3, 0.3)
PAPER_ITEMS = (1000, 1267, 570, 1838, 10_042, 500)


def acquisition(paraphrase: int, once: int) -> Case:
    """A of so many paragraphs."""
    labels = ["paraphrase"] * paraphrase + ["once"] * once
    means = np.repeat([0.6, 0.2], [paraphrase, once])

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        before = -generator.gamma(4, 0.75, means.size)
        gain = generator.gamma(1.5, means / 1.5) * -before / 3
        after = before + gain + generator.normal(0, 0.15, means.size)
        interval = acquisition_interval(before, after, strata=labels)
        return interval.low, interval.high

    return float(means.mean()) / 3, draw


def forgetting(items: tuple[int, ...], right: tuple[float, ...], lost: float, won: float) -> Case:
    """F of tasks with so many items."""
    before = np.array(right)
    after = before * (1 - lost) + (1 - before) * won

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        scores: tuple[list[TaskScore], list[TaskScore]] = ([], [])
        for number, (count, share) in enumerate(zip(items, right, strict=True)):
            first = generator.random(count) < share
            change = generator.random(count)
            last = np.where(first, change >= lost, change < won)
            for kept, answers in zip(scores, (first, last), strict=True):
                kept.append(TaskScore(str(number), answers.mean(), math.nan, answers.astype(float)))
        interval = forgetting_interval(*scores)
        return interval.low, interval.high

    return float(1 - after.mean() / before.mean()), draw


def effectivity(paragraphs: int) -> Case:
    """Effectivity of an injection of so many paragraphs, probed at every second step."""
    steps = np.arange(0, 61, 2)
    rise = np.clip((steps - 20) / 12, 0, 1) - 0.12 * np.log(np.maximum(steps - 31, 1))

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        gain = generator.gamma(1.5, 0.4, paragraphs)
        values = rise[:, None] * gain - generator.gamma(4, 0.75, paragraphs)
        values += generator.normal(0, 0.1, values.shape)
        (interval,) = effectivity_intervals(
            steps, values, dynamics(steps, values.mean(axis=1), [20])
        )
        return interval.low, interval.high

    return 0.6 * float(rise.max()), draw


def seeds(count: int, skewed: bool) -> Case:
    """The mean over so many seeds: normal, or log-normal with σ = 0.5."""

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        values = generator.normal(0, 0.5, count)
        ends = student_interval(np.exp(values) if skewed else values)
        assert ends is not None
        return ends

    return math.exp(0.125) if skewed else 0.0, draw


def task(items: int, right: float) -> Case:
    """Accuracy on a task of so many items."""

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        low, high = wilson_interval(generator.binomial(items, right) / items, items)
        return float(low), float(high)

    return right, draw


def jackknife(instances: int) -> Case:
    """A mean over instances, of which up to 64 groups are left out in turn."""
    sizes = group_sizes(instances)
    ends = np.cumsum(sizes)

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        values = generator.normal(size=instances)
        sums = np.diff(values.cumsum()[ends - 1], prepend=0.0)
        replicates = (values.sum() - sums) / (instances - sizes)
        half = critical_t(sizes) * float(standard_error(values.mean(), replicates, sizes))
        return values.mean() - half, values.mean() + half

    return 0.0, draw


def correlation(starts: int, true: float) -> Case:
    """Pearson's r over so many starts."""

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        x = generator.normal(size=starts)
        y = true * x + math.sqrt(1 - true**2) * generator.normal(size=starts)
        r = correlate(x, y)
        return r.low, r.high

    return true, draw


def partial(starts: int, true: float) -> Case:
    """A correlation over starts that both trend with the step, which is held fixed."""
    step = np.linspace(0.0, 3.0, starts)
    fixed = fixed_columns(np.zeros(starts), step)

    def draw(generator: np.random.Generator) -> tuple[float, float]:
        x, rest = generator.normal(size=(2, starts))
        y = true * x + math.sqrt(1 - true**2) * rest
        r = float(partial_correlation(x + step, y + 2 * step, fixed))
        return fisher_interval(r, starts - 1 - fixed.shape[1])

    return true, draw


CASES: dict[str, Case] = {
    "A, 70 + 60 paragraphs (paper)": acquisition(70, 60),
    "A, 20 + 10": acquisition(20, 10),
    "A, 9 + 7 (demo)": acquisition(9, 7),
    "A, 4 + 3": acquisition(4, 3),
    "F, six tasks of 500 to 10,042 items (paper)": forgetting(PAPER_ITEMS, SIX_TASKS, 0.12, 0.1),
    "F, six tasks of 50": forgetting((50,) * 6, SIX_TASKS, 0.1, 0.08),
    "F, 160 items (demo)": forgetting((160,), (0.55,), 0.25, 0.1),
    "F, 160 items, four change": forgetting((160,), (0.55,), 0.03, 0.02),
    **{f"effectivity, {n} paragraphs": effectivity(n) for n in (70, 20, 9, 6, 2)},
    **{f"mean over {n} seeds, normal": seeds(n, skewed=False) for n in (2, 3, 5)},
    **{f"mean over {n} seeds, log-normal": seeds(n, skewed=True) for n in (2, 3, 5)},
    **{f"accuracy {p}, {n} items": task(n, p) for n in (50, 160, 1000) for p in (0.3, 0.6, 0.97)},
    **{f"jackknife, {n} instances": jackknife(n) for n in (10, 32, 192)},
    **{f"r = {r}, {n} starts": correlation(n, r) for n in (4, 10, 18) for r in (0.0, -0.8, 0.95)},
    **{
        f"r = {r}, {n} starts, step fixed": partial(n, r)
        for n in (5, 10, 18)
        for r in (0.0, -0.8, 0.95)
    },
}


def coverage(case: Case, num_sets: int, seed: int = 0) -> tuple[float, float, float]:
    """How often an interval holds the true value, lies above it, and lies below it."""
    true, draw = case
    generator = np.random.Generator(np.random.PCG64(seed))
    low, high = np.array([draw(generator) for _ in range(num_sets)]).T
    return float(((low <= true) & (true <= high)).mean()), *(
        float(missed.mean()) for missed in (low > true, high < true)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shares = {}
    for number, (name, case) in enumerate(CASES.items()):
        shares[name] = coverage(case, options.sets, seed=number)
        held, above, below = (100 * share for share in shares[name])
        print(f"{name}: {held:.1f} % hold, {above:.1f} above, {below:.1f} below", flush=True)
    if options.json:
        print(json.dumps(shares))


if __name__ == "__main__":
    main()
