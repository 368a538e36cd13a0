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
    torch.testing.assert_close(got, loop(logits), atol=5e-7, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_the_loss_is_that_of_the_loop_and_leaves_the_entropy_as_it_is(spread):
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(70, 211, generator=generator)
    targets = torch.randint(0, 211, (70,), generator=generator)
    expected = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        top = max(row)
        expected.append(top + math.log(sum(math.exp(z - top) for z in row)) - row[target])
    entropy, nats = next_token_entropy(logits, targets)
    torch.testing.assert_close(nats, torch.tensor(expected).double(), atol=1e-5, rtol=1e-6)
    assert torch.equal(entropy, next_token_entropy(logits))
    chunked = streamed_entropy(torch.arange(70), lambda part: logits[part], 2**19, targets)
    torch.testing.assert_close(chunked, torch.stack([entropy, nats]))


def test_the_loss_of_an_impossible_token_is_infinite_and_of_a_certain_one_zero():
    logits = torch.tensor([[0.0, -torch.inf], [-5000.0, 0.0], [-5000.0, 0.0]])
    nats = next_token_entropy(logits, torch.tensor([1, 0, 1]))[1]
    assert nats.tolist() == [math.inf, 5000.0, 0.0]


def test_limits_uniform_one_hot_and_impossible_tokens():
    torch.testing.assert_close(
        next_token_entropy(torch.full((3, 50), 7.0)),
        torch.full((3,), math.log(50), dtype=torch.float64),
        atol=1e-9,
        rtol=0,
    )
    one_hot = torch.full((2, 50), -torch.inf)
    one_hot[:, 4] = 12.0
    assert next_token_entropy(one_hot).tolist() == [0.0, 0.0]
    two = torch.full((1, 50), -torch.inf)
    two[:, 4:6] = 12.0
    assert float(next_token_entropy(two)) == pytest.approx(math.log(2), abs=1e-9)


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 9)
    logits[1, 3] = torch.nan
    got = next_token_entropy(logits)
    assert float(got[0]) == pytest.approx(math.log(9), abs=1e-9)
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
    torch.testing.assert_close(got, next_token_entropy(hidden @ weight.T), atol=5e-7, rtol=0)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3)).bfloat16()
    torch.testing.assert_close(next_token_entropy(logits), loop(logits), atol=5e-7, rtol=0)


def confident(offset, margin):
    """Logits of 64 tokens over 50,304: one stands out by about ``margin``, all near ``offset``."""
    generator = torch.Generator().manual_seed(4)
    logits = offset + 2 * torch.randn(64, 50304, generator=generator)
    favourite = torch.randint(50304, (64, 1), generator=generator)
    return logits.scatter_add_(1, favourite, torch.full((64, 1), margin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "margin"), [(40.0, 30.0), (-80.0, 16.0), (0.0, 60.0)])
def test_confident_predictions_have_no_rounding_bias(offset, margin, dtype):
    logits = confident(offset, margin).to(dtype)
    log_p = torch.log_softmax(logits.double(), dim=-1)
    expected = -(log_p.exp() * log_p).sum(dim=-1)
    torch.testing.assert_close(next_token_entropy(logits), expected, atol=5e-7, rtol=0)


def test_confident_predictions_stream_without_bias():
    logits = confident(40.0, 30.0)
    log_p = torch.log_softmax(logits.double(), dim=-1)
    chunks: list[int] = []

    def head(rows):
        chunks.append(len(rows))
        return logits[rows[:, 0].long()]

    got = streamed_entropy(torch.arange(64.0)[:, None], head, 2**19)  # 32 tokens a chunk
    assert chunks == [32, 32]
    torch.testing.assert_close(got, -(log_p.exp() * log_p).sum(dim=-1), atol=5e-7, rtol=0)
