from __future__ import annotations

import pytest
import torch

from ke_ray.core.coefficients import TokenMean


def activations(num_tokens, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 33, generator=generator).to(dtype)


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_equal_a_loop_over_tokens(blocked, num_tokens, dtype):
    mean = TokenMean(blocked=blocked)
    c, g, u = (activations(num_tokens, seed, dtype) for seed in (1, 2, 3))
    kept = [x.clone() for x in (c, g, u)]
    plain, relu, ungated = torch.zeros(3, 33, dtype=torch.float64)
    for t in range(num_tokens):
        for i in range(33):
            plain[i] += abs(float(c[t, i])) / num_tokens
            relu[i] += abs(max(float(g[t, i]), 0.0) * float(u[t, i])) / num_tokens
            ungated[i] += max(float(u[t, i]), 0.0) / num_tokens
    for got, expected in (
        (mean.magnitude(c), plain),
        (mean.rectified(g, u), relu),
        (mean.rectified(u), ungated),
    ):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip((c, g, u), kept, strict=True))


def test_bfloat16_sums_do_not_saturate():
    ones = torch.ones(5000, 4, dtype=torch.bfloat16)  # a bfloat16 sum stops growing at 256
    for blocked in (True, False):
        assert TokenMean(blocked=blocked).magnitude(ones).tolist() == [1.0] * 4


def test_strided_halves_of_a_fused_projection_are_read_in_place():
    fused = torch.randn(300, 66, generator=torch.Generator().manual_seed(4))
    gate, up = fused.chunk(2, dim=-1)
    got = TokenMean(blocked=True).rectified(gate, up)
    torch.testing.assert_close(got, (gate.relu() * up).abs().mean(0))


def test_one_buffer_serves_layers_of_any_width_and_dtype():
    mean = TokenMean(blocked=True)
    for width, dtype in ((33, torch.float32), (7, torch.float32), (7, torch.float64)):
        x = torch.full((300, width), -2.0, dtype=dtype)
        assert mean.magnitude(x).tolist() == [2.0] * width


def test_nan_is_not_hidden():
    x = activations(300)
    x[270, 5] = torch.nan
    for blocked in (True, False):
        got = TokenMean(blocked=blocked).magnitude(x)
        assert torch.isnan(got).nonzero()[:, 0].tolist() == [5]
        got = TokenMean(blocked=blocked).rectified(x, x)
        assert torch.isnan(got).nonzero()[:, 0].tolist() == [5]
