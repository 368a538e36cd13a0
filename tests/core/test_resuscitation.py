from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ke_ray.core.entropy import entropy_nats
from ke_ray.core.resuscitation import (
    CONTROLS,
    check_parameters,
    dead_rows,
    multipliers,
    predicted_coefficients,
    predicted_entropy_nats,
    select_rows,
)
from ke_ray.errors import UserError


def _coefficients(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator).double() ** 3 + 1e-3


@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("d_mlp", [1, 2, 3, 64, 257])
def test_selection_equals_the_quantile_comparison(ratio: float, d_mlp: int) -> None:
    coefficients = _coefficients(3, d_mlp)
    threshold = torch.quantile(coefficients, ratio, dim=-1, keepdim=True)
    selected = select_rows(coefficients, ratio)
    assert torch.equal(selected, coefficients <= threshold)
    assert selected.sum(dim=-1).tolist() == [math.floor(ratio * (d_mlp - 1)) + 1] * 3


def test_ties_at_the_threshold_are_all_selected() -> None:
    coefficients = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0]])
    assert select_rows(coefficients, 0.01).tolist() == [[False, True, True, True, False]]


def test_selection_of_more_values_than_torch_quantile_takes_and_in_bf16() -> None:
    """torch.quantile refuses more than 2^24 values and any half-precision dtype."""
    wide = torch.arange(2**24 + 1, dtype=torch.float64)[None] + 1.0
    assert int(select_rows(wide, 0.5).sum()) == 2**23 + 1
    half = _coefficients(2, 64).bfloat16()
    assert torch.equal(select_rows(half, 0.5), select_rows(half.double(), 0.5))
    assert torch.equal(multipliers(half, 0.5, 2.0), multipliers(half.double(), 0.5, 2.0))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_multipliers_equal_a_loop_from_the_algorithm(ratio: float, factor: float) -> None:
    coefficients = _coefficients(2, 33)
    result = multipliers(coefficients, ratio, factor)
    for layer, row in enumerate(coefficients.tolist()):
        threshold = float(np.quantile(row, ratio))
        mean = math.fsum(row) / len(row)
        for index, value in enumerate(row):
            expected = factor * mean / value if value <= threshold else 1.0
            assert float(result[layer, index]) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-8, 128.0, 1e6])
def test_the_scale_of_the_coefficients_does_not_matter(scale: float) -> None:
    coefficients = _coefficients(2, 50)
    torch.testing.assert_close(
        multipliers(coefficients * scale, 0.5, 2.0),
        multipliers(coefficients, 0.5, 2.0),
        rtol=1e-12,
        atol=0,
    )


def test_permuting_memories_permutes_multipliers() -> None:
    coefficients = _coefficients(2, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        multipliers(coefficients[:, order], 0.5, 2.0),
        multipliers(coefficients, 0.5, 2.0)[:, order],
        rtol=1e-13,
        atol=0,
    )


def test_uniform_coefficients_are_all_selected_and_scaled_by_the_factor() -> None:
    uniform = torch.full((2, 16), 0.3)
    torch.testing.assert_close(
        multipliers(uniform, 0.25, 3.0), torch.full((2, 16), 3.0).double(), rtol=1e-12, atol=0
    )


def test_selected_coefficients_become_factor_times_the_old_mean() -> None:
    coefficients = _coefficients(3, 40)
    result = multipliers(coefficients, 0.5, 2.0)
    predicted = predicted_coefficients(coefficients, result)
    selected = select_rows(coefficients, 0.5)
    target = (2.0 * coefficients.mean(dim=-1, keepdim=True)).expand_as(coefficients)
    torch.testing.assert_close(predicted[selected], target[selected], rtol=1e-13, atol=0)
    assert torch.equal(predicted[~selected], coefficients[~selected])


def test_raising_everything_to_the_mean_predicts_the_ceiling() -> None:
    coefficients = _coefficients(2, 64)
    predicted = predicted_entropy_nats(coefficients, multipliers(coefficients, 1.0, 1.0))
    assert predicted.tolist() == pytest.approx([math.log(64)] * 2, abs=1e-12)


def test_changing_nothing_predicts_the_entropy_there_is() -> None:
    coefficients = _coefficients(2, 64)
    torch.testing.assert_close(
        predicted_entropy_nats(coefficients, torch.ones(2, 64)), entropy_nats(coefficients)
    )


def test_dead_memories_are_counted_but_left_as_they_are() -> None:
    coefficients = _coefficients(2, 20)
    coefficients[0, [2, 11]] = 0.0
    coefficients[1, 5] = 1e-20
    result = multipliers(coefficients, 0.5, 2.0)
    assert bool(torch.isfinite(result).all())
    assert result[0, [2, 11]].tolist() == [1.0, 1.0]
    assert float(result[1, 5]) == 1.0
    assert select_rows(coefficients, 0.5).sum(dim=-1).tolist() == [10, 10]
    assert (result != 1.0).sum(dim=-1).tolist() == [8, 9]
    assert dead_rows(coefficients).sum(dim=-1).tolist() == [2, 1]
    predicted = predicted_coefficients(coefficients, result)
    assert predicted[0, [2, 11]].tolist() == [0.0, 0.0]


def test_the_mean_still_counts_dead_memories() -> None:
    coefficients = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    assert multipliers(coefficients, 0.4, 1.0).tolist() == [[1.0, 2.0, 1.0, 1.0]]


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_a_layer_of_zeros_is_left_alone(control: str | None) -> None:
    coefficients = torch.zeros(2, 8)
    coefficients[1] = torch.arange(1, 9)
    result = multipliers(coefficients, 0.5, 2.0, control=control, up_row_norms=torch.ones(2, 8))
    assert torch.equal(result[0], torch.ones(8).double())
    assert bool(torch.isfinite(result).all())


def test_random_control_moves_the_same_multipliers_to_random_rows() -> None:
    coefficients = _coefficients(4, 200)
    algorithm = multipliers(coefficients, 0.5, 2.0)
    control = multipliers(coefficients, 0.5, 2.0, control="random", seed=3)
    for layer in range(4):
        assert torch.equal(control[layer].sort().values, algorithm[layer].sort().values)
    selected = select_rows(coefficients, 0.5)
    hit = (control != 1.0) & selected
    # Half of the rows are selected; random rows fall on them half of the time (SD 1.8 % here).
    assert float(hit.sum() / selected.sum()) == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(control[0] != 1.0, control[1] != 1.0)


def test_random_control_is_reproduced_by_its_seed_only() -> None:
    coefficients = _coefficients(2, 100)
    first = multipliers(coefficients, 0.5, 2.0, control="random", seed=0)
    assert torch.equal(first, multipliers(coefficients, 0.5, 2.0, control="random", seed=0))
    assert not torch.equal(first, multipliers(coefficients, 0.5, 2.0, control="random", seed=1))
    assert torch.equal(
        multipliers(coefficients, 0.5, 2.0, seed=0), multipliers(coefficients, 0.5, 2.0, seed=1)
    )


def test_random_control_reaches_every_row_equally_often() -> None:
    coefficients = _coefficients(1, 10)
    counts = sum(
        (multipliers(coefficients, 0.3, 2.0, control="random", seed=seed) != 1.0)[0].long()
        for seed in range(1000)
    )
    # 3 of 10 rows in 1,000 draws: 300 ± 14.5 each.
    assert bool(((counts - 300).abs() < 75).all()), counts


def test_matched_norm_gives_the_norm_of_the_algorithm_and_keeps_the_shares() -> None:
    coefficients = _coefficients(3, 60)
    up = torch.randn(3, 60, 16, generator=torch.Generator().manual_seed(2)).double()
    norms = up.norm(dim=-1)
    algorithm = multipliers(coefficients, 0.5, 2.0)
    control = multipliers(
        coefficients, 0.5, 2.0, control="matched_norm", up_row_norms=norms.float()
    )
    for layer in range(3):
        raised = (up[layer] * algorithm[layer, :, None]).norm()
        matched = (up[layer] * control[layer, :, None]).norm()
        assert float(matched) == pytest.approx(float(raised), rel=1e-6)
        assert len(control[layer].unique()) == 1
        assert float(matched) > float(up[layer].norm())
    torch.testing.assert_close(
        predicted_entropy_nats(coefficients, control),
        entropy_nats(coefficients),
        rtol=1e-13,
        atol=0,
    )
    assert bool(
        (predicted_entropy_nats(coefficients, algorithm) > entropy_nats(coefficients)).all()
    )


def test_matched_norm_needs_the_norms() -> None:
    coefficients = _coefficients(2, 8)
    for norms in (None, torch.ones(2, 9)):
        with pytest.raises(ValueError, match="norms of the up projection's rows"):
            multipliers(coefficients, 0.5, 2.0, control="matched_norm", up_row_norms=norms)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.0001, 50, math.nan])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"resuscitation ratio is .*\(0, 1\]"):
        multipliers(_coefficients(1, 4), ratio, 1.0)
    with pytest.raises(UserError, match="resuscitation ratio"):
        select_rows(_coefficients(1, 4), ratio)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(UserError, match=r"amplifying factor is .*above 0"):
        multipliers(_coefficients(1, 4), 0.5, factor)


def test_an_unknown_control_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'matched_norm'"):
        check_parameters(0.5, 1.0, "matchednorm")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_coefficients_that_are_no_means_of_magnitudes_are_refused(bad: float) -> None:
    coefficients = _coefficients(3, 4)
    coefficients[1, 2] = bad
    with pytest.raises(UserError, match="layer 1 hold 1 negative or non-finite"):
        multipliers(coefficients, 0.5, 2.0)


def test_coefficients_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected \[n_layers, d_mlp\]"):
        select_rows(torch.ones(4), 0.5)
    with pytest.raises(ValueError, match="must be alike"):
        predicted_coefficients(torch.ones(2, 4), torch.ones(2, 3))


def test_inputs_are_not_changed() -> None:
    coefficients = _coefficients(2, 30)
    before = coefficients.clone()
    for control in (None, *CONTROLS):
        multipliers(coefficients, 0.5, 2.0, control=control, up_row_norms=torch.ones(2, 30))
    assert torch.equal(coefficients, before)


@pytest.mark.parametrize("activation", [torch.nn.functional.silu, torch.nn.functional.gelu])
def test_the_law_holds_exactly_in_a_gated_layer(activation) -> None:  # type: ignore[no-untyped-def]
    """C = f(gate x) · up x computed with scaled weights, not with scaled coefficients."""
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(24, 8, generator=generator).double()
    up = torch.randn(24, 8, generator=generator).double()
    x = torch.randn(500, 8, generator=generator).double()
    mean = (activation(x @ gate.T) * (x @ up.T)).abs().mean(dim=0, keepdim=True)
    result = multipliers(mean, 0.5, 2.0)
    measured = (activation(x @ gate.T) * (x @ (up * result[0, :, None]).T)).abs().mean(dim=0)
    torch.testing.assert_close(
        measured, predicted_coefficients(mean, result)[0], rtol=1e-12, atol=0
    )


def test_the_law_is_only_approximate_in_an_ungated_gelu_layer() -> None:
    generator = torch.Generator().manual_seed(4)
    up = torch.randn(24, 8, generator=generator).double()
    x = torch.randn(500, 8, generator=generator).double()
    mean = torch.nn.functional.gelu(x @ up.T).abs().mean(dim=0, keepdim=True)
    result = multipliers(mean, 0.5, 2.0)
    measured = torch.nn.functional.gelu(x @ (up * result[0, :, None]).T).abs().mean(dim=0)
    predicted = predicted_coefficients(mean, result)[0]
    assert float((measured / predicted - 1).abs().max()) > 1e-3
