"""The LM head of a model as a function of its final hidden states."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.architectures import check_config
from ke_ray.models.loading import require_head


def language_head(model: Any, names: Collection[str]) -> Callable[[Tensor], Tensor]:
    """From final hidden states [tokens, d_model] to the model's own logits [tokens, vocabulary].

    Args:
        names: the tables that are computed from logits, for the message where there is no head.

    Raises:
        CheckpointError, UnsupportedArchitectureError: the model has no head, or its logits are not
            what its description says.
    """
    purpose = "loss" if "token_nats" in names else "next_token_entropy"
    projection = require_head(model, purpose)
    entry = check_config(model.config)
    scale = float(getattr(model.config, entry.logit_multiplier)) if entry.logit_multiplier else 1.0
    if entry.logit_divisor:
        scale /= float(getattr(model.config, entry.logit_divisor))
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = logits.float() if logits.dtype != torch.float64 else logits
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        return logits

    if entry.model_type:  # a user's description, which may lack something
        _check_head(model, head)
    return head


def _check_head(model: Any, head: Callable[[Tensor], Tensor]) -> None:
    """Raise UnsupportedArchitectureError unless ``head`` makes the model's own logits."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
        own = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise UnsupportedArchitectureError(
            f"the logits of {type(model).__name__} are not its head applied to its final hidden "
            "states. Name the keys of its configuration that scale them in the description "
            "(logit_multiplier, logit_divisor), or leave out next_token_entropy, loss and "
            "perplexity."
        )
