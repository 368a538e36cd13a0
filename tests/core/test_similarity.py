"""Similarity of memory use: against loops from the equations, limits and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from ke_ray.core.similarity import NAMES, average_ranks, over_layers, similarities


def coefficients(n: int, m: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.5, size=(n, m))


def loop(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The equations of the docstring, one pair at a time."""
    k = max(1, math.floor(0.01 * len(a) + 0.5))
    top = [set(sorted(range(len(v)), key=lambda i: (-v[i], i))[:k]) for v in (a, b)]
    return {
        "js_distance": float(jensenshannon(a, b)),
        "cosine": float(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))),
        "rank_correlation": float(stats.spearmanr(a, b).statistic),
        "top_overlap": len(top[0] & top[1]) / k,
    }


@pytest.mark.parametrize("m", [40, 500])
def test_every_pair_is_what_the_equations_say(m):
    one, other = coefficients(5, m), coefficients(3, m, seed=1)
    one[:, : m // 4] = one[:, :1]  # ties
    values = similarities(one, other)
    for i in range(5):
        for j in range(3):
            expected = loop(one[i], other[j])
            assert {name: values[name][i, j] for name in NAMES} == pytest.approx(expected)


def test_rows_compared_with_each_other_are_those_compared_with_a_copy():
    rows = coefficients(400, 3000)[:20]
    alone, copied = similarities(rows), similarities(rows, rows.copy())
    for name in NAMES:
        assert alone[name] == pytest.approx(copied[name], abs=1e-7)


def test_many_rows_are_compared_block_by_block():
    rows = coefficients(60, 8192)
    values = similarities(rows)["js_distance"]
    assert values[3, 59] == pytest.approx(float(jensenshannon(rows[3], rows[59])))


def test_equal_use_scaled_is_the_same_use_and_disjoint_use_is_the_farthest():
    a = coefficients(1, 200)
    same = similarities(a, 3 * a)
    assert {name: value.item() for name, value in same.items()} == pytest.approx(
        {"js_distance": 0.0, "cosine": 1.0, "rank_correlation": 1.0, "top_overlap": 1.0}, abs=1e-7
    )
    apart = similarities(np.eye(100)[:1], np.eye(100)[1:2])
    assert apart["js_distance"].item() == pytest.approx(math.sqrt(math.log(2)))
    assert apart["cosine"].item() == apart["top_overlap"].item() == 0


def test_a_row_of_zeros_has_no_value_and_leaves_the_others_alone():
    rows = coefficients(3, 50)
    rows[1] = 0
    for name, value in similarities(rows).items():
        assert np.isnan(value[1]).all(), name
        assert np.isfinite(value[np.ix_([0, 2], [0, 2])]).all(), name


def test_a_layer_is_compared_over_its_own_memories():
    layers = coefficients(3 * 2, 60).reshape(3, 2, 60)
    layers[:, 1, 40:] = np.nan
    layers = np.concatenate([layers, np.full((3, 1, 60), np.nan)], axis=1)
    wide, narrow, none = over_layers(layers)
    assert wide["cosine"] == pytest.approx(similarities(layers[:, 0])["cosine"])
    assert narrow["cosine"] == pytest.approx(similarities(layers[:, 1, :40])["cosine"])
    assert all(np.isnan(value).all() for value in none.values())


def test_other_memories_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        similarities(np.ones((2, 5)), np.ones((2, 6)))


def test_equal_values_share_the_mean_of_their_ranks():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert average_ranks(values) == pytest.approx(stats.rankdata(values))
