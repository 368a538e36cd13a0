"""Losses in chunks of tokens against the cross-entropy of all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_decoders import TINY
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ke_ray.training.loss import row_losses

VOCABULARY, ROWS, LENGTH = 97, 3, 10
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def gradients_of(model: Any, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (losses * torch.arange(1.0, ROWS + 1)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_chunks_give_the_losses_and_gradients_of_the_whole(
    tiny_decoder: Callable[..., Any], model_type: str
) -> None:
    model = tiny_decoder(model_type)
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    whole = F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").sum(dim=1)
    expected = gradients_of(model, whole)
    losses = row_losses(model, IDS, max_logits=7 * VOCABULARY)
    found = gradients_of(model, losses)
    torch.testing.assert_close(losses, whole, rtol=1e-6, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    # The model is as before.
    assert model(input_ids=IDS, use_cache=False).logits.shape == (ROWS, LENGTH, VOCABULARY)


class _LargestLogits(TorchDispatchMode):
    """The most tokens whose values for the whole vocabulary are in one tensor."""

    num_tokens = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.num_tokens = max(self.num_tokens, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_the_logits_of_more_tokens_than_a_chunk(
    tiny_decoder: Callable[..., Any], precision: torch.dtype
) -> None:
    model = tiny_decoder("llama", hidden_size=8, intermediate_size=16)  # weights stay small too
    with _LargestLogits() as seen:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses = row_losses(model, IDS, max_logits=9 * VOCABULARY)
        losses.sum().backward()
    assert seen.num_tokens == 9
    with _LargestLogits() as seen:
        row_losses(model, IDS)
    assert seen.num_tokens == ROWS * LENGTH


def test_gradients_of_the_head_are_summed_in_float32_over_chunks(
    tiny_decoder: Callable[..., Any],
) -> None:
    """Under autocast a cached copy of its weight would sum them in bfloat16."""
    model = tiny_decoder("llama")
    ids = torch.randint(3, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(2))
    name = "lm_head.weight"

    def gradient(max_logits: int, *, exact: bool = False) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            row_losses(model, ids, max_logits=max_logits).sum().backward()
        return dict(model.named_parameters())[name].grad.clone()

    expected = gradient(10**9, exact=True)

    def error(found: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    whole = error(gradient(10**9))
    assert error(gradient(4 * VOCABULARY)) < 1.2 * whole  # 256 chunks
