"""Layers of unequal width, and layers without a value, in sums and values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ke_ray.core.jackknife import standard_error
from ke_ray.core.layers import Absence, Layers
from ke_ray.core.measures import MEASURES, evaluate
from ke_ray.core.statistics import GroupSums

WIDTHS = (5, 0, 8)
ATTENTION = (Absence.NONE, Absence.NO_ATTENTION, Absence.ALIBI)
N = 6
NAMES = [name for name, measure in MEASURES.items() if measure.total != "only"]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.rand(N, 3, 8, generator=generator, dtype=torch.float64)
    return coefficients, torch.rand(N, 3, generator=generator, dtype=torch.float64)


def sums_of(data, instances):
    coefficients, attention = data
    sums = GroupSums.empty(
        N,
        ["coefficients", "coefficients_relu", "token_entropies", "attention_entropy"],
        layers=Layers.of(WIDTHS, ATTENTION),
    )
    rows = torch.tensor(instances)
    sums.add("coefficients", rows, coefficients[rows])
    sums.add("coefficients_relu", rows, coefficients[rows])
    sums.add("token_entropies", rows, attention[rows])
    sums.add("attention_entropy", rows, attention[rows])
    sums.count(rows, torch.ones_like(rows))
    return sums


def test_each_layer_is_measured_by_its_own_memories(data):
    got = evaluate(sums_of(data, list(range(N))), NAMES)
    for layer in (0, 2):
        alone = GroupSums.empty(N, ["coefficients"], n_layers=1, d_mlp=WIDTHS[layer])
        rows = torch.arange(N)
        alone.add("coefficients", rows, data[0][:, layer : layer + 1, : WIDTHS[layer]])
        alone.count(rows, torch.ones_like(rows))
        for name in NAMES:
            if MEASURES[name].needs == "coefficients":
                row, expected = got.row(name, layer), evaluate(alone, name).row(name, 0)
                assert row.value == pytest.approx(expected.value, abs=1e-12), name
                assert row.stderr == pytest.approx(expected.stderr, nan_ok=True, abs=1e-12)
                assert row.d_mlp == WIDTHS[layer]


def test_totals_and_their_errors_are_over_the_layers_that_have_a_value(data):
    got = evaluate(sums_of(data, list(range(N))), NAMES)
    for name in ("knowledge_entropy", "gini"):
        present = [got.row(name, layer).value for layer in (0, 2)]
        mean = 2 if MEASURES[name].total == "mean" else 1
        assert got.row(name).value == pytest.approx(sum(present) / mean)
        replicates = got.replicates[(0, name)] + got.replicates[(2, name)]
        error = standard_error(sum(present), replicates, got.group_counts) / mean
        assert got.row(name).stderr == pytest.approx(float(error))
    assert got.row("attention_entropy").value == got.row("attention_entropy", 0).value
    assert got.row("knowledge_entropy").d_mlp is None


@pytest.mark.parametrize(
    ("measure", "layer", "reason"),
    [
        ("knowledge_entropy", 1, "no feed-forward part"),
        ("dormant_share", 1, "no feed-forward part"),
        ("memory_information", 1, "no feed-forward part"),
        ("attention_entropy", 1, "no softmax attention"),
        ("attention_entropy", 2, "ALiBi"),
    ],
)
def test_what_has_no_meaning_is_null_with_its_reason_and_no_failure(data, measure, layer, reason):
    got = evaluate(sums_of(data, list(range(N))), NAMES)
    row = got.row(measure, layer)
    assert math.isnan(row.value)
    assert math.isnan(row.stderr)
    assert reason in row.reason
    assert (layer, measure) not in got.replicates
    assert got.is_finite()
    broken = sums_of(data, list(range(N)))
    broken.tables["coefficients"][0, 0, 2] = torch.nan
    assert not evaluate(broken, ["knowledge_entropy"]).is_finite()


def test_a_measure_that_no_layer_has_is_null_in_total(data):
    layers = Layers.of((4, 4), (Absence.ALIBI, Absence.ALIBI))
    sums = GroupSums.empty(2, ["attention_entropy"], layers=layers)
    sums.count(torch.arange(2), torch.ones(2, dtype=torch.int64))
    total = evaluate(sums, "attention_entropy").row("attention_entropy")
    assert math.isnan(total.value)
    assert "ALiBi" in total.reason


def test_parts_that_travelled_give_what_the_whole_gives(data):
    whole = evaluate(sums_of(data, list(range(N))), NAMES)
    merged = GroupSums.from_tensors(sums_of(data, [4, 1, 0]).to_tensors())
    merged.merge_tensors(sums_of(data, [2, 5, 3]).to_tensors())
    assert merged.layers == Layers.of(WIDTHS, ATTENTION)
    for row, other in zip(whole.rows, evaluate(merged, NAMES).rows, strict=True):
        assert (row.layer, row.measure, row.reason) == (other.layer, other.measure, other.reason)
        np.testing.assert_allclose(row.value, other.value, atol=1e-12)
    mean = merged.mean("coefficients")
    assert mean.isnan().sum(dim=1).tolist() == [3, 8, 0]
