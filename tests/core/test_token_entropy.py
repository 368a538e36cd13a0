"""The split of knowledge entropy: limiting cases, exactness, and parts of memories joined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ke_ray.core.measures import evaluate
from ke_ray.core.statistics import GroupSums
from ke_ray.core.token_entropy import TokenEntropies, mass_and_entropy

SPLIT = ("knowledge_entropy", "token_entropy", "memory_information")
LENGTHS = (5, 1, 3, 8)  # instances of unequal length: a token of the second weighs most


def evaluated(instances: list[torch.Tensor]):
    """The three measures of one layer, from |C| [T_n, d_mlp] of each instance."""
    n = len(instances)
    sums = GroupSums.empty(n, ["coefficients", "token_entropies"], d_mlp=instances[0].shape[1])
    for number, rows in enumerate(instances):
        at = torch.tensor([number])
        sums.count(at, torch.tensor([len(rows)]))
        sums.add("coefficients", at, rows.double().abs().mean(dim=0)[None, None])
        sums.add("token_entropies", at, mass_and_entropy(rows)[1].mean()[None, None])
    return evaluate(sums, SPLIT)


def rows_of(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t, 40, generator=generator).pow(3).to(dtype) for t in LENGTHS]


def test_both_terms_add_up_to_knowledge_entropy_with_their_errors_where_lengths_differ():
    got = evaluated(rows_of(0))
    for layer in (0, None):
        whole, token, information = (got.row(name, layer).value for name in SPLIT)
        assert token + information == pytest.approx(whole, abs=1e-14)
        assert 0 < token < whole
        replicates = [got.replicates[layer, name] for name in SPLIT]
        np.testing.assert_allclose(replicates[1] + replicates[2], replicates[0], atol=1e-14)
        assert all(got.row(name, layer).stderr > 0 for name in SPLIT)


def test_the_terms_are_those_of_the_mean_over_instances_and_not_over_tokens():
    instances = rows_of(1)
    tokens = [(1 / (4 * len(rows)), row.abs().double()) for rows in instances for row in rows]
    total = sum(share * float(c.sum()) for share, c in tokens)
    expected = -sum(
        share * float(c.sum()) / total * sum(p * math.log(p) for p in (c / c.sum()).tolist())
        for share, c in tokens
    )
    assert evaluated(instances).row("token_entropy").value == pytest.approx(expected, abs=1e-6)
    pooled = evaluated([torch.cat(instances)]).row("token_entropy").value
    assert abs(pooled - expected) > 1e-3


def test_tokens_that_use_the_same_memories_in_the_same_shares_carry_no_information():
    p = torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 4
    instances = [p * (1 + t) * torch.rand(t, 1) for t in LENGTHS]
    got = evaluated(instances)
    assert got.row("memory_information").value == pytest.approx(0.0, abs=1e-6)
    assert got.row("token_entropy").value == pytest.approx(got.row("knowledge_entropy").value)


def test_tokens_of_one_memory_each_have_no_entropy_of_their_own():
    got = evaluated([torch.eye(8), -2 * torch.eye(8)])
    assert got.row("token_entropy").value == 0.0
    assert got.row("memory_information").value == pytest.approx(math.log(8))


def test_a_token_without_mass_adds_nothing_and_other_values_pass_through():
    rows = torch.tensor([[0.0, 0.0], [0.0, 3.0], [2.0, -2.0], [1e-38, 1e-38]])
    mass, weighted = mass_and_entropy(rows)
    assert mass.tolist() == pytest.approx([0, 3, 4, 2e-38], rel=1e-6)
    assert weighted.tolist() == pytest.approx(
        [0, 0, 4 * math.log(2), 2e-38 * math.log(2)], rel=1e-5
    )
    broken = mass_and_entropy(torch.tensor([[math.nan, 1.0], [math.inf, 1.0]]))[1]
    assert not torch.isfinite(broken).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_terms_of_every_dtype_are_summed_in_float32_at_least(dtype):
    rows = (torch.randn(70, 3000, generator=torch.Generator().manual_seed(3)) * 0.01).to(dtype)
    before = rows.clone()
    mass, weighted = mass_and_entropy(rows)
    exact = rows.double().abs()
    p = exact / exact.sum(dim=1, keepdim=True)
    torch.testing.assert_close(mass, exact.sum(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted / mass, torch.special.entr(p).sum(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(rows, before)


def test_experts_that_come_one_by_one_make_the_entropy_of_all_their_memories():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(30, 24, generator=generator, dtype=torch.float64)
    weights = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    routed = torch.rand(30, 2, generator=generator) < 0.6
    tokens = TokenEntropies(30)
    whole = rows.clone()
    for e, columns in enumerate((slice(0, 16), slice(16, 24))):
        chosen = routed[:, e].nonzero()[:, 0]
        tokens.add(chosen, rows[chosen, columns], weights[chosen, e])
        whole[:, columns] *= (weights[:, e] * routed[:, e])[:, None]
    torch.testing.assert_close(tokens.weighted(), mass_and_entropy(whole)[1], rtol=0, atol=1e-12)
    assert bool((tokens.weighted()[~routed.any(dim=1)] == 0.0).all())
