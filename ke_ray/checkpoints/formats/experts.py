"""Names of experts' weights: one tensor per expert in files, fused tensors in memory.

    memory   mlp.experts.gate_up_proj [experts, 2m, d], mlp.experts.down_proj [experts, d, m]
    files    mlp.experts.N.gate_proj.weight [m, d], .up_proj.weight, .down_proj.weight
    Mixtral  block_sparse_moe.experts.N.w1.weight, .w3.weight, .w2.weight

transformers converts while it loads and saves. gpt-oss is fused in its files too, in another order
of axes and with biases, and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)")
_MIXTRAL = re.compile(r"\.block_sparse_moe\.(?P<expert>experts\.\d+\.)?")
_MIXTRAL_PROJECTIONS = {"w1.weight": "gate_proj", "w3.weight": "up_proj", "w2.weight": "down_proj"}


def plain_expert_name(name: str) -> str:
    """A stored name as the other families have it: Mixtral's own are replaced."""
    match = _MIXTRAL.search(name)
    if match is None:
        return name
    rest = name[match.end() :]
    if match["expert"] and rest in _MIXTRAL_PROJECTIONS:
        rest = f"{_MIXTRAL_PROJECTIONS[rest]}.weight"
    return f"{name[: match.start()]}.mlp.{match['expert'] or ''}{rest}"


def unfused(
    name: str, tensor: torch.Tensor, names: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that files store of one in memory: views, one per expert and projection.

    Args:
        names: of all tensors of the model.
    """
    match = _FUSED.fullmatch(name)
    if match is None or f"{match['experts']}.gate_up_proj_bias" in names:
        yield name, tensor
        return
    for number, expert in enumerate(tensor):
        prefix = f"{match['experts']}.{number}"
        if match["kind"] == "down_proj":
            yield f"{prefix}.down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield f"{prefix}.gate_proj.weight", gate
            yield f"{prefix}.up_proj.weight", up
