"""Interventions: a change of the model, under which the loss on D is measured again.

    sensitivity_PART_γ   ΔL(γ) = E_ε[L(θ + γ σ_W ε)] − L(θ), ε ~ N(0, 1): every tensor W of PART is
                         perturbed; `all`, `ffn`, `attention`, or `embeddings` with the head
    masking_END_SHARE    L(θ with coefficients zeroed) − L(θ): in every layer those of the SHARE
                         `least` or `most` used memories by C̄ˡ, at least one of them
    σ_W                  standard deviation of the entries of W, in the checkpoint itself
    L                    nats per predicted token, both terms on the same instances of D

The number is part of the name, so a folder may get more of them later. Progressive sensitivity is
that of Springer et al. 2025, arXiv 2503.19206, of which we could read the abstract and the
introduction alone: **neither the scale of their noise nor the set of tensors that they perturb is
confirmed.** With σ_W of the checkpoint, γ is noise as a share of the weights, so that larger
weights alone make no checkpoint less sensitive; with the scale of the initialisation they would.

E_ε is a mean over seeds 0, 1, …. A stream belongs to a seed and the name of a tensor, never to a
checkpoint: all checkpoints of a series are moved in the same directions, and their differences do
not carry the noise of other draws. Errors are the jackknife's, over instances, the draws held
fixed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ke_ray.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PARTS = ("all", "ffn", "attention", "embeddings")
ENDS = ("least", "most")
#: The table of predicted tokens of the instances on which models are changed.
INTERVENED = "intervened_predictions"

#: Instances on which models are changed, and draws of noise, where nothing else is said.
NUM_INSTANCES, NUM_SEEDS = 128, 4

_NAME = re.compile(rf"sensitivity_({'|'.join(PARTS)})_(.*)|masking_({'|'.join(ENDS)})_(.*)")
_BLOCK = 2**22  # entries whose noise stands in memory at once; part of what a stream is


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """A table of Σ_t (ℓ' − ℓ) of each instance, ℓ' the loss of a token with the model changed.

    Attributes:
        kind: noise on weights, or coefficients zeroed.
        target: of noise one of `PARTS`, of a mask one of `ENDS`.
        amount: γ ≥ 0, or the share of memories, in (0, 1).
    """

    kind: Literal["noise", "mask"]
    target: str
    amount: float
    tap: Literal["intervention"] = "intervention"
    table_axes: tuple[str, ...] = ()
    is_pooled: bool = False

    @property
    def measure(self) -> str:
        """The name of its measure."""
        prefix = "sensitivity" if self.kind == "noise" else "masking"
        return f"{prefix}_{self.target}_{self.amount:g}"

    @property
    def name(self) -> str:
        """The name of the table."""
        return f"rise_{self.measure}"


def intervention_named(measure: str) -> Intervention | None:
    """The intervention that a measure's name says; None for other names.

    Raises:
        UserError: a γ or a share that is no such number, or not written the one way it has.
    """
    match = _NAME.fullmatch(measure)
    if match is None:
        return None
    is_noise = match[1] is not None
    target, text = (match[1], match[2]) if is_noise else (match[3], match[4])
    amount = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else -1.0
    if not (0 <= amount <= 10 if is_noise else 0 < amount < 1) or f"{amount:g}" != text:
        expected = "γ from 0 to 10" if is_noise else "a share of memories above 0 and below 1"
        raise UserError(
            f"measure {measure!r} ends in {text!r}; expected {expected}, of at most 6 digits and "
            f"without trailing zeros, such as {measure[: -len(text)] if text else measure}0.01"
        )
    return Intervention(kind="noise" if is_noise else "mask", target=target, amount=amount)


def is_chosen(instance: int, num_chosen: int, num_instances: int) -> bool:
    """Whether an instance of D is one of the evenly spread ones on which models are changed."""
    chosen = min(num_chosen, num_instances)
    return (instance + 1) * chosen // num_instances > instance * chosen // num_instances


def noise_stream(seed: int, name: str) -> np.random.Generator:
    """The draws of one tensor."""
    import numpy as np

    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    return np.random.Generator(np.random.PCG64([seed, *words.tolist()]))


def add_noise(weight: Tensor, gamma: float, *, seed: int, name: str) -> None:
    """W ← W + γ σ_W ε, in place.

    Draws and sums are float32 (float64 for float64 weights) whatever the dtype of W, and made on
    the CPU, so that draws are the same on all devices and of all dtypes. bfloat16 weights round
    noise below a γ of about 0.005 away: of the noise on 10⁶ Gaussian weights they keep 52 % at
    γ = 0.001, 81 % at 0.002, 99 % at 0.005, 100 % at 0.02.

    Args:
        weight: of any floating dtype and shape, on any device.
    """
    import numpy as np
    import torch

    flat = weight.reshape(-1)
    scale = gamma * _standard_deviation(flat)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    stream = noise_stream(seed, name)
    for block in flat.split(_BLOCK):
        draws = torch.from_numpy(stream.standard_normal(len(block), dtype=np.float32))
        block.copy_(block.to(dtype) + scale * draws.to(weight.device, dtype))
    if flat.data_ptr() != weight.data_ptr():  # it is not contiguous
        weight.copy_(flat.view_as(weight))


def _standard_deviation(flat: Tensor) -> float:
    mean = sum(float(block.double().sum()) for block in flat.split(_BLOCK)) / max(1, len(flat))
    squares = (float((block.double() - mean).square().sum()) for block in flat.split(_BLOCK))
    return float((sum(squares) / max(1, len(flat))) ** 0.5)


def masked_memories(mean_coefficients: Tensor, end: str, share: float) -> Tensor:
    """The least or most used memories of a layer.

    Args:
        mean_coefficients: [d_mlp] C̄ˡ.
        end: ``least`` or ``most``.
        share: of d_mlp; the nearest whole number of memories, at least one.

    Returns:
        int64 indices; of equally used memories the first ones.
    """
    number = max(1, round(share * len(mean_coefficients)))
    return mean_coefficients.argsort(stable=True, descending=end == "most")[:number]
