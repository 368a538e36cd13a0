"""Held-out perplexity equals the definition, whatever the batching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ke_ray.errors import DataError
from ke_ray.evaluation.perplexity import Perplexity, held_out_perplexity

Build = Callable[..., Any]


def rows_and_lengths() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.array([20, 1, 7, 20, 2, 13])
    ids = rng.integers(3, 97, (6, 20)).astype(np.int32)
    ids[np.arange(20) >= lengths[:, None]] = 0
    return ids, lengths


@torch.no_grad()
def from_the_definition(model: Any, ids: np.ndarray, lengths: np.ndarray) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, length in zip(ids, lengths, strict=True):
        logits = model(torch.tensor(row[None, :length].astype(np.int64))).logits[0].double()
        for t in range(1, length):
            total -= float(torch.log_softmax(logits[t - 1], 0)[row[t]])
            count += 1
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 6, 100])
def test_it_is_the_mean_over_predicted_tokens(tiny_model: Build, batch_size: int) -> None:
    model = tiny_model("olmo")
    ids, lengths = rows_and_lengths()
    expected, count = from_the_definition(model, ids, lengths)
    result = held_out_perplexity(model, ids, lengths, batch_size=batch_size)
    assert result.num_tokens == count == 57
    assert result.nats_per_token == pytest.approx(expected, abs=1e-6)
    assert result.perplexity == pytest.approx(np.exp(expected), rel=1e-6)


def test_without_lengths_every_token_counts(tiny_model: Build) -> None:
    model = tiny_model("gpt2").train()
    ids = np.random.default_rng(1).integers(3, 97, (3, 9))
    expected, _ = from_the_definition(tiny_model("gpt2"), ids, np.array([9, 9, 9]))
    result = held_out_perplexity(model, torch.from_numpy(ids))
    assert result.num_tokens == 24
    assert result.nats_per_token == pytest.approx(expected, abs=1e-6)
    assert model.training


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tiny_model: Build) -> None:
    model = tiny_model("olmo")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = held_out_perplexity(model, np.ones((2, 5), dtype=np.int64))
    assert result.perplexity == pytest.approx(97, rel=1e-5)
    assert Perplexity(1e6, 3).perplexity == float("inf")


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (np.ones(4, dtype=np.int64), None, "expected \\[rows, T\\]"),
        (np.ones((2, 4), dtype=np.int64), [5, 1], "do not fit"),
        (np.ones((2, 4), dtype=np.int64), [1, 1], "no token to predict"),
        (np.full((1, 4), 97), None, "the model has 97 embeddings"),
        (np.ones((1, 66), dtype=np.int64), None, "has 66 tokens, and the model takes 64"),
    ],
)
def test_bad_input_is_one_clear_message(
    tiny_model: Build, ids: np.ndarray, lengths: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        held_out_perplexity(tiny_model("olmo"), ids, lengths)
