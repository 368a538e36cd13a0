"""AdamW with the OLMo recipe's groups: embeddings, norms and biases are not decayed.

A tied output head is the embedding and so is not decayed; an untied one is.
"""

from __future__ import annotations

import torch
from torch import nn

from ke_ray.studies.training import OptimizerSettings


def decayed_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trainable parameters that are decayed, and of those that are not.

    Names are those of ``model.named_parameters()`` (a shared tensor has one name), in its order.
    """
    exempt: set[int] = set()
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        if is_norm or isinstance(module, nn.Embedding):
            exempt.update(id(p) for p in module.parameters(recurse=False))
    decay: list[str] = []
    no_decay: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = id(parameter) in exempt or name.endswith("bias") or parameter.ndim < 2
        (no_decay if plain else decay).append(name)
    return decay, no_decay


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over ``model``'s trainable parameters in the two groups of :func:`decayed_names`.

    Build it after FSDP has sharded the model: the shards are then what it updates.
    """
    parameters = dict(model.named_parameters())
    decay, no_decay = decayed_names(model)
    groups = [
        {"params": [parameters[n] for n in decay], "weight_decay": settings.weight_decay},
        {"params": [parameters[n] for n in no_decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_gpu = all(p.is_cuda for p in parameters.values())
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True if on_gpu else None,
    )


def clip_gradients(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale gradients in place to a global L2 norm of at most ``max_norm`` (None: leave them).

    Returns:
        The norm before clipping, a scalar float tensor on the model's device; equal on all
        workers.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    full = getattr(norm, "full_tensor", None)  # FSDP: a DTensor whose parts are still apart
    norm = full() if full is not None else norm
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
