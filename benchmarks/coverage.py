"""Are the error bars true? How often a 95 % interval holds what it is an estimate of.

    python benchmarks/coverage.py FIRST_CHECKPOINT LAST_CHECKPOINT [--sets 800]

Two checkpoints score a pool of consecutive pieces of T tokens of each of three kinds of text once,
piece by piece. From the pool any number of sources is made: its documents, drawn with replacement,
one after the other, 16 times as many pieces as instances are wanted. From each source N instances
are taken by the rule of ``sampling: spread`` and by ``sampling: first``; groups, values, errors and
paired errors are those of the package. Columns, for each measure (totals), single (the first
checkpoint's value) and paired (last minus first):

    error/spread  root mean square of the reported error over the standard deviation of the values
    coverage      how often value ± t·error holds the mean of all sets; Student's t of G − 1 or,
                  for unequal groups, (Σn)²/Σn² − 1 degrees
    bias/spread   (mean of all sets − value on the whole pool) / spread: what more instances change

With ``--precision`` the paired knowledge entropy is scanned by the rule of a wanted precision
(``core.stopping``): rounds of more and more of the N instances, until the paired error is that
share of the change. Coverage is then of the mean of all sets at the N where a set stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from ke_ray.core import concentration, entropy, stopping
from ke_ray.core.jackknife import document_groups, group_sizes, standard_error
from ke_ray.core.measures import MEASURES, evaluate, required_sums
from ke_ray.core.statistics import GroupSums
from ke_ray.data.documents import iter_documents
from ke_ray.data.packing import pack_documents
from ke_ray.data.sampling import slot_starts
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_instances

FUNCTIONS = {
    "knowledge_entropy": entropy.entropy_nats,
    "knowledge_entropy_relu": entropy.entropy_nats,
    "attention_entropy": lambda mean: mean,
    "next_token_entropy": lambda mean: mean,
    "effective_memories": entropy.effective_memories,
    "participation_ratio": concentration.participation_ratio,
    "gini": concentration.gini,
    "top_k_mass": concentration.top_k_mass,
}
SMOOTH = tuple(FUNCTIONS)
TABLES = required_sums(SMOOTH)
CHUNK = 64  # as many instances have a group each, so that sums per group are values per instance


@dataclass
class Pool:
    """Pieces of one kind of text: for each checkpoint tables [n, …], and each piece's document."""

    tables: list[dict[str, torch.Tensor]]
    documents: list[np.ndarray]  # pieces of each document, consecutive


def build_pool(source: str, checkpoints: list[str], length: int, size: int) -> Pool:
    """Score the first ``size`` pieces of a source."""
    ends: list[int] = []
    tokenizer = load_tokenizer(checkpoints[0])
    models = [load_model(path) for path in checkpoints]
    blocks, count = [], 0
    for block in pack_documents(
        iter_documents(source),
        tokenizer,
        sequence_length=length,
        eos_token_id=int(models[0].config.eos_token_id),
        document_ends=ends,
    ):
        blocks.append(block)
        count += len(block)
        if count >= size:
            break
    ids = torch.from_numpy(np.concatenate(blocks)[:size].astype(np.int64))
    ids = ids[: len(ids) // CHUNK * CHUNK]
    middles = np.arange(len(ids)) * length + length // 2
    document = np.searchsorted(np.array(ends), middles, side="right")
    tables = []
    for model in models:
        parts = [
            score_instances(
                model, chunk, measures=SMOOTH, num_instances=CHUNK, batch_size=CHUNK
            ).tables
            for chunk in ids.split(CHUNK)
        ]
        tables.append({n: torch.cat([part[n].float() for part in parts]) for n in TABLES})
    places = np.flatnonzero(np.diff(document)) + 1
    return Pool(tables, np.split(np.arange(len(ids)), places))


def draw(
    pool: Pool, count: int, rule: str, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of one sample and the sizes of its groups."""
    wanted, chosen = 16 * count, []
    while wanted > 0:
        chosen.append(int(generator.integers(len(pool.documents))))
        wanted -= len(pool.documents[chosen[-1]])
    pieces = np.concatenate([pool.documents[number] for number in chosen])
    document = np.repeat(np.arange(len(chosen)), [len(pool.documents[number]) for number in chosen])
    if rule == "first":
        return pieces[:count], group_sizes(count)
    starts = slot_starts(len(pieces), count, 1, generator.random(count))
    return pieces[starts], document_groups(document[starts], document[starts])


def measure(
    tables: dict[str, torch.Tensor], pieces: np.ndarray, sizes: np.ndarray
) -> dict[str, np.ndarray]:
    """[1 + G] for each measure: its total on all pieces, then without each group.

    The same as ``core.measures.evaluate``, of all groups at once (``check`` compares the two).
    """
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    found = {}
    for table, values in tables.items():
        sums = np.add.reduceat(values[torch.from_numpy(pieces)].numpy(), first, dtype=np.float64)
        total = sums.sum(axis=0)
        counts = (len(pieces) - sizes).reshape(-1, *[1] * (sums.ndim - 1))
        means = np.concatenate([total[None] / len(pieces), (total - sums) / counts])
        for name in SMOOTH:
            if MEASURES[name].needs == table:
                layers = FUNCTIONS[name](torch.from_numpy(means)).numpy()
                combine = {"sum": np.sum, "mean": np.mean}.get(MEASURES[name].total)
                found[name] = layers if combine is None else combine(layers, axis=-1)
    return found


def check(tables: dict[str, torch.Tensor], pieces: np.ndarray, sizes: np.ndarray) -> None:
    """Compare ``measure`` with the package's own evaluation."""
    _, n_layers, d_mlp = tables["coefficients"].shape
    sums = GroupSums.empty(
        len(pieces), TABLES, n_layers=n_layers, d_mlp=d_mlp, sizes=sizes.tolist()
    )
    sums.count(torch.arange(len(pieces)), torch.ones(len(pieces), dtype=torch.int64))
    for name in TABLES:
        sums.add(name, torch.arange(len(pieces)), tables[name][torch.from_numpy(pieces)])
    expected = evaluate(sums, SMOOTH)
    for name, values in measure(tables, pieces, sizes).items():
        np.testing.assert_allclose(values[0], expected.row(name).value, rtol=1e-9)
        np.testing.assert_allclose(values[1:], expected.replicates[None, name], rtol=1e-9)


def simulate(pool: Pool, count: int, rule: str, num_sets: int, seed: int) -> dict[str, dict]:
    """Values and errors over many sets, judged."""
    generator = np.random.Generator(np.random.PCG64(seed))
    size = sum(map(len, pool.documents))
    whole = [measure(tables, np.arange(size), group_sizes(size)) for tables in pool.tables]
    kept: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(num_sets):
        pieces, sizes = draw(pool, count, rule, generator)
        if turn == 0:
            check(pool.tables[0], pieces, sizes)
        first, last = (measure(tables, pieces, sizes) for tables in pool.tables)
        worth = sizes.sum() ** 2 / (sizes**2).sum()  # G where groups are equal
        quantile = float(student.ppf(0.975, worth - 1))
        for name in SMOOTH:
            for kind, values in (("single", first[name]), ("paired", last[name] - first[name])):
                error = float(standard_error(values[0], values[1:], sizes))
                kept.setdefault(f"{name} {kind}", []).append((float(values[0]), error, quantile))
    found = {}
    for key, triples in kept.items():
        value, error, quantile = np.array(triples).T
        name, kind = key.split()
        true = whole[0][name][0] if kind == "single" else whole[1][name][0] - whole[0][name][0]
        spread = value.std(ddof=1)
        found[key] = {
            "error/spread": float(np.sqrt((error**2).mean()) / spread),
            "coverage": float((np.abs(value - value.mean()) <= quantile * error).mean()),
            "bias/spread": float((value.mean() - true) / spread),
            "spread": float(spread),
        }
    return found


def simulate_stopping(
    pool: Pool, count: int, precision: float, num_sets: int, seed: int
) -> dict[str, float]:
    """The paired change at which the rule stopped, with the interval it reports.

    Coverage is of the mean over sets at the N where each set stopped, so that what N itself changes
    does not enter: the same sets, all at that N, are the sample without a rule.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    name = "knowledge_entropy"
    tables = [{MEASURES[name].needs: whole[MEASURES[name].needs]} for whole in pool.tables]
    strides = stopping.round_strides(count)
    sets: list[dict[int, tuple[float, float, float]]] = []  # per set: N → value, error, quantile
    stops, scored = [], []
    for _ in range(num_sets):
        pieces, sizes = draw(pool, count, "spread", generator)
        groups = np.repeat(np.arange(len(sizes)), sizes)
        values: dict[int, tuple[float, float, float]] = {}
        for size, stride in strides.items():
            thin = np.bincount(groups[::stride])
            thin = thin[thin > 0]
            first, last = (measure(t, pieces[::stride], thin)[name] for t in tables)
            shown = stopping.curve_precision([first[0], last[0]], [first[1:], last[1:]], thin)
            worth = thin.sum() ** 2 / (thin**2).sum()
            quantile = float(student.ppf(0.975, worth - 1))
            values[size] = (float(last[0] - first[0]), shown.error, quantile)
        sets.append(values)
        size: int | None = next(iter(strides))
        total = 0
        while size is not None:
            total, stop = total + size, size
            value, error, _ = values[size]
            shown = stopping.CurvePrecision(abs(value), error)
            wanted = shown.wanted_error(share=precision, absolute=None)
            size = stopping.next_round(size, count, shown, wanted)
        stops.append(stop)
        scored.append(total)
    means = {size: np.mean([values[size][0] for values in sets]) for size in strides}

    def covered(size: int, values: dict[int, tuple[float, float, float]]) -> bool:
        value, error, quantile = values[size]
        return bool(abs(value - means[size]) <= quantile * error)

    final = np.array([values[stop][:2] for values, stop in zip(sets, stops, strict=True)])
    usual = max(set(stops), key=stops.count)
    return {
        "coverage": float(np.mean([covered(n, v) for v, n in zip(sets, stops, strict=True)])),
        "coverage at the usual N without a rule": float(np.mean([covered(usual, v) for v in sets])),
        "error/change, largest": float((final[:, 1] / np.abs(final[:, 0])).max()),
        "stopped at N, mean": float(np.mean(stops)),
        "tokens of all rounds / tokens of N": float(np.mean(scored) / count),
        "bias/change": float((final[:, 0].mean() - means[count]) / abs(means[count])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs=2)
    parser.add_argument("--sets", type=int, default=800, help="of spread; a quarter of first")
    parser.add_argument("--texts", nargs="+", default=["dolma", "c4", "pubmed"])
    parser.add_argument("--pool", type=int, default=3072, help="pieces of each kind of text")
    parser.add_argument("--length", type=int, default=64, help="T")
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 192, 2048], help="N")
    parser.add_argument("--precision", type=float, nargs="+", help="simulate the stopping rule")
    parser.add_argument("--out", default="coverage.json")
    asked = parser.parse_args()
    data = Path(os.environ["KE_RAY_REFERENCE_DATA"]) / "data"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results: dict[str, dict] = {}
    for text in asked.texts:
        started = time.monotonic()
        source = str(data / f"{text}_sample")
        pool = build_pool(source, asked.checkpoints, asked.length, asked.pool)
        pieces = sum(map(len, pool.documents))
        print(
            f"{text}: {pieces} pieces of {asked.length} tokens, {len(pool.documents)} documents, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        for count, precision in itertools.product(asked.counts, asked.precision or ()):
            stopped = simulate_stopping(pool, count, precision, asked.sets, seed=count)
            results[f"{text} {count} precision {precision}"] = stopped
            shown = ", ".join(f"{key} {value:.3g}" for key, value in stopped.items())
            print(f"{text} N={count} precision {precision}: {shown}", flush=True)
            Path(asked.out).write_text(json.dumps(results, indent=1))
        for count in () if asked.precision else asked.counts:
            for rule in ("spread", "first"):
                num_sets = asked.sets if rule == "spread" else asked.sets // 4
                found = simulate(pool, count, rule, num_sets, seed=count)
                results[f"{text} {count} {rule}"] = found
                ratios = [entry["error/spread"] for entry in found.values()]
                covers = [entry["coverage"] for entry in found.values()]
                print(
                    f"{text} N={count} {rule}: error/spread {min(ratios):.2f}–{max(ratios):.2f}, "
                    f"coverage {100 * min(covers):.1f}–{100 * max(covers):.1f} %",
                    flush=True,
                )
                Path(asked.out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
