from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ke_ray.core.attention import attention_entropy, probabilities_entropy, rows_entropy


def tensors(seed=0, batch=2, heads=3, length=9, d_head=8, dtype=torch.float32, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, heads, length, d_head)
    query, key = (spread * torch.randn(shape, generator=generator)).to(dtype)
    return query, key


def loop(query, key, scale, visible, softcap=None):
    """One row at a time, float64."""
    query, key = query.double(), key.double()
    out = torch.zeros(query.shape[:-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, query.shape[:-1])).tolist():
        scores = []
        for j in range(key.shape[2]):
            if visible(t, j):
                s = scale * float(query[b, h, t] @ key[b, h, j])
                scores.append(softcap * math.tanh(s / softcap) if softcap else s)
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        total = sum(weights)
        out[b, h, t] = -sum(w / total * math.log(w / total) for w in weights if w > 0)
    return out


def window(t, j):
    return t - 4 < j <= t


def test_identity_equals_the_loop_over_rows():
    query, key = tensors()
    expected = loop(query, key, 0.3, lambda t, j: j <= t)
    torch.testing.assert_close(
        attention_entropy(query, key, scale=0.3).double(), expected, atol=5e-6, rtol=0
    )
    exact, output = rows_entropy(query, key, scale=0.3, rows=4)
    torch.testing.assert_close(exact.double(), expected, atol=5e-6, rtol=0)
    assert output is None


@pytest.mark.parametrize("windowed", [False, True])
def test_large_scores_leave_no_rounding_bias(windowed):
    """A key bias as in Qwen-2 (scores near 100 in every row), and heads that look at one key."""
    query, key = tensors(seed=7, batch=1, length=64, d_head=16)
    common = torch.randn(1, 3, 1, 16, generator=torch.Generator().manual_seed(8))
    query[:, 0] += 4 * common[:, 0]
    key[:, 0] += 8 * common[:, 0]
    query[:, 1] += 4 * common[:, 1]
    key[:, 1, 0] = 10 * common[:, 1, 0]
    positions = torch.arange(64)
    distance = positions[:, None] - positions[None, :]
    mask = ((distance >= 0) & (distance < (4 if windowed else 64)))[None, None]
    scores = (0.25 * query.double() @ key.double().mT).masked_fill(~mask, -torch.inf)
    assert scores.max() > 100
    log_p = torch.log_softmax(scores, dim=-1)
    expected = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(dim=-1)
    got = attention_entropy(query, key, scale=0.25, mask=mask if windowed else None)
    error = got.double() - expected
    assert error.abs().max() < 1e-5
    assert error.mean(dim=-1).abs().max() < 5e-7


def test_sliding_window_mask_is_used_in_both_calls():
    query, key = tensors(seed=1)
    positions = torch.arange(9)
    distance = positions[:, None] - positions[None, :]
    mask = ((distance >= 0) & (distance < 4))[None, None]
    expected = loop(query, key, 0.5, window)
    for got in (
        attention_entropy(query, key, scale=0.5, mask=mask),
        rows_entropy(query, key, scale=0.5, mask=mask, rows=4)[0],
    ):
        torch.testing.assert_close(got.double(), expected, atol=5e-6, rtol=0)


def test_soft_capped_rows_equal_the_loop_and_attend_like_the_softmax():
    query, key = tensors(seed=2)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(3))
    got, output = rows_entropy(query, key, value, scale=0.5, softcap=1.5, rows=4)
    expected = loop(query, key, 0.5, lambda t, j: j <= t, softcap=1.5)
    torch.testing.assert_close(got.double(), expected, atol=5e-6, rtol=0)
    scores = 1.5 * torch.tanh(0.5 * query @ key.transpose(-1, -2) / 1.5)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    torch.testing.assert_close(output, p @ value, atol=1e-5, rtol=1e-5)


def test_an_additive_bias_is_part_of_the_scores():
    query, key = tensors(seed=4)
    positions = torch.arange(9.0)
    bias = -0.3 * (positions[:, None] - positions[None, :])
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    got, _ = rows_entropy(query, key, scale=0.5, mask=bias.masked_fill(future, -torch.inf))
    scores = (0.5 * query @ key.transpose(-1, -2) + bias).double()
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    expected = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(got.double(), expected, atol=5e-6, rtol=0)


def test_limits_uniform_one_key_and_one_hot():
    _, key = tensors(seed=5)
    uniform = attention_entropy(torch.zeros_like(key), key, scale=1.0)
    torch.testing.assert_close(
        uniform, torch.arange(1.0, 10.0).log().expand(2, 3, 9), atol=1e-6, rtol=0
    )
    query, key = tensors(seed=6, spread=20.0)
    sharp = attention_entropy(query, key, scale=1.0)
    assert bool((sharp >= 0).all())
    assert float(sharp[..., 0].max()) < 2e-4  # one visible key, scores of the order of 1000
    assert float(sharp.median()) < 1e-3


def test_half_precision_inputs_are_computed_in_float32():
    query, key = tensors(seed=7, length=64, dtype=torch.bfloat16)
    got = attention_entropy(query, key, scale=0.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention_entropy(query.float(), key.float(), scale=0.3))
    assert attention_entropy(query.double(), key.double(), scale=0.3).dtype == torch.float64


def test_a_common_shift_of_all_keys_changes_nothing():
    query, key = tensors(seed=8, dtype=torch.float64)
    shift = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(
        attention_entropy(query, key, scale=0.3), attention_entropy(query, key + shift, scale=0.3)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("length", "d_head"), [(9, 8), (33, 10), (512, 64)])
def test_the_gpu_gives_what_the_cpu_gives(length, d_head):
    query, key = tensors(seed=10, length=length, d_head=d_head)
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None, :]
    mask = ((distance >= 0) & (distance < 5))[None, None]
    for m in (None, mask):
        expected = attention_entropy(query.double(), key.double(), scale=0.1, mask=m)
        moved = None if m is None else m.cuda()
        got = attention_entropy(query.cuda(), key.cuda(), scale=0.1, mask=moved)
        torch.testing.assert_close(got.cpu().double(), expected, atol=2e-5, rtol=0)


def test_rows_that_are_given_have_the_entropy_of_the_loop() -> None:
    scores = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    scores[..., 4:] = -torch.inf  # hidden keys
    rows = scores.softmax(dim=-1)
    got = probabilities_entropy(rows, rows=2)
    for index in np.ndindex(2, 3, 5):
        expected = -sum(p * math.log(p) for p in rows[index].tolist() if p > 0)
        assert float(got[index]) == pytest.approx(expected, abs=1e-6)
