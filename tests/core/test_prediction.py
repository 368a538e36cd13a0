from __future__ import annotations

import math

import pytest
import torch

from ke_ray.core.prediction import next_token_entropy, streamed_entropy


def loop(logits):
    out = []
    for row in logits.double().tolist():
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        total = sum(weights)
        out.append(-sum(w / total * math.log(w / total) for w in weights if w > 0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_equals_the_loop_over_the_vocabulary(spread):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(37, 211, generator=generator)
    got = next_token_entropy(logits)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, loop(logits), atol=2e-5, rtol=0)


def test_limits_uniform_one_hot_and_impossible_tokens():
    torch.testing.assert_close(
        next_token_entropy(torch.full((3, 50), 7.0)),
        torch.full((3,), math.log(50), dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )
    one_hot = torch.full((2, 50), -torch.inf)
    one_hot[:, 4] = 12.0
    assert next_token_entropy(one_hot).tolist() == [0.0, 0.0]
    two = torch.full((1, 50), -torch.inf)
    two[:, 4:6] = 12.0
    assert float(next_token_entropy(two)) == pytest.approx(math.log(2), abs=1e-6)


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 9)
    logits[1, 3] = torch.nan
    got = next_token_entropy(logits)
    assert float(got[0]) == pytest.approx(math.log(9), abs=1e-6)
    assert math.isnan(float(got[1]))


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(next_token_entropy(logits), next_token_entropy(logits + 100))


def test_streaming_in_chunks_gives_the_same_and_never_forms_all_logits():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(301, 16, generator=generator)
    weight = torch.randn(2**17, 16, generator=generator) * 0.1
    seen: list[int] = []

    def head(part):
        seen.append(len(part))
        return part @ weight.T

    got = streamed_entropy(hidden, head, 2**17)
    assert max(seen) * 2**17 <= 2**24
    assert sum(seen) == 301
    torch.testing.assert_close(got, next_token_entropy(hidden @ weight.T), atol=1e-5, rtol=0)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3)).bfloat16()
    torch.testing.assert_close(next_token_entropy(logits), loop(logits), atol=1e-5, rtol=0)
