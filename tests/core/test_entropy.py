from __future__ import annotations

import math

import pytest
import torch

from ke_ray.core.entropy import effective_memories, entropy_nats


def test_equals_a_loop_from_the_equation() -> None:
    coefficients = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)).double()
    for layer, row in enumerate(coefficients.tolist()):
        total = math.fsum(row)
        loop = -math.fsum(c / total * math.log(c / total) for c in row)
        assert float(entropy_nats(coefficients)[layer]) == pytest.approx(loop, abs=1e-14)


@pytest.mark.parametrize("d_mlp", [1, 2, 8192])
def test_uniform_is_the_ceiling_and_one_hot_is_zero(d_mlp: int) -> None:
    uniform = torch.full((2, d_mlp), 0.3)
    assert entropy_nats(uniform).tolist() == pytest.approx([math.log(d_mlp)] * 2, abs=1e-12)
    assert effective_memories(uniform).tolist() == pytest.approx([d_mlp] * 2, rel=1e-12)
    one_hot = torch.zeros(d_mlp)
    one_hot[-1] = 5.0
    assert float(entropy_nats(one_hot)) == 0.0
    assert float(effective_memories(one_hot)) == 1.0


def test_uniform_over_k_memories_counts_k() -> None:
    coefficients = torch.zeros(100)
    coefficients[10:17] = 2.0
    assert float(effective_memories(coefficients)) == pytest.approx(7.0, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 128.0, 1e30])
def test_scale_and_permutation_change_nothing(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.rand(4, 50, generator=generator).double()
    shuffled = coefficients[:, torch.randperm(50, generator=generator)] * scale
    torch.testing.assert_close(
        entropy_nats(shuffled), entropy_nats(coefficients), rtol=1e-13, atol=0
    )


def test_low_precision_input_is_evaluated_in_float64() -> None:
    coefficients = torch.rand(2, 8192, generator=torch.Generator().manual_seed(2)).bfloat16()
    result = entropy_nats(coefficients)
    assert result.dtype == torch.float64
    assert torch.equal(result, entropy_nats(coefficients.double()))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_layer_without_a_distribution_is_nan_and_the_others_are_not(bad: float) -> None:
    coefficients = torch.ones(2, 8)
    coefficients[0] = bad
    result = entropy_nats(coefficients)
    assert math.isnan(float(result[0]))
    assert math.isnan(float(effective_memories(coefficients)[0]))
    assert float(result[1]) == pytest.approx(math.log(8))


def test_a_negative_coefficient_is_nan() -> None:
    assert math.isnan(float(entropy_nats(torch.tensor([1.0, -0.5, 2.0]))))
    assert math.isnan(float(entropy_nats(torch.tensor([-1.0, -1.0]))))
