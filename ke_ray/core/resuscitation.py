"""Resuscitation (Algorithm 1) and its controls, as one multiplier per row of the up projection.

    t   = p-quantile of C̄ˡ (linear interpolation)
    idx = {i : C̄ˡ_i ≤ t}
    u_i = q · mean(C̄ˡ) / C̄ˡ_i  for i in idx, 1 elsewhere         (the mean is over all m memories)
    K'_i = u_i K_i                                              (rows of the up projection)

Source: Algorithm 1 of arXiv 2410.01380. C̄ may have any scale: only ratios within a layer enter.

    symbol   meaning
    C̄ˡ_i     mean absolute coefficient of memory i in layer l, [n_layers, m] with m = d_mlp of the
             widest layer; NaN beyond the memories of a narrower one
    p        resuscitation ratio, in (0, 1]
    q        amplifying factor, above 0
    K        up projection, [m, d_model]: `up_proj`; the first m rows of OLMo's fused `ff_proj`

What the scaling does. In a gated FFN without biases the coefficient is f(gate(x)) · K_i x, linear
in row i, so with the layer's inputs held fixed C̄'_i = u_i C̄_i, that is q · mean(C̄) on idx: exact in
the first layer, approximate deeper, because scaled early layers change later inputs. Where the up
projection has a bias, scaling the row alone leaves the bias term and the law is approximate; with
the bias scaled too it is as exact as without one. In an ungated FFN the coefficient is f(K_i x),
not linear in the row, and the law is approximate everywhere (ReLU without bias excepted).

Departures, each only where the algorithm leaves a number undefined:

* Dead memories. Where C̄_i is 0 (or below 1e-12 of the layer's mean, where float32 sums hold
  nothing but rounding) mean/C̄_i has no usable value. Such a row is selected like any other, so that
  the count is the algorithm's, and its multiplier is 1: no finite factor can raise a coefficient
  that is zero on D, and a huge one would only make noise of it elsewhere. A layer that is zero
  throughout is left as it is.
* The quantile is compared without being formed: t lies in [C̄_(k), C̄_(k+1)) with
  k = floor(p (m − 1)) + 1 counted from 1, so idx = {C̄_i ≤ C̄_(k)} exactly, in float64, for inputs of
  any dtype and size. Ties at the threshold are all selected, as in the paper.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ke_ray.core.entropy import entropy_nats
from ke_ray.errors import UserError, nearest

Control = Literal["random", "matched_norm"]
CONTROLS: tuple[str, ...] = get_args(Control)

DEAD_RELATIVE = 1e-12
"""A coefficient at or below this share of its layer's mean counts as zero."""


def check_parameters(ratio: float, factor: float, control: str | None = None) -> None:
    """Raises UserError unless 0 < ratio ≤ 1, 0 < factor < ∞ and the control is one of CONTROLS."""
    if not 0.0 < ratio <= 1.0:
        raise UserError(
            f"The resuscitation ratio is {ratio}; expected the share of memories to raise, in "
            "(0, 1], for example 0.5."
        )
    if not 0.0 < factor < math.inf:
        raise UserError(
            f"The amplifying factor is {factor}; expected a finite number above 0, for example 2."
        )
    if control is not None and control not in CONTROLS:
        raise UserError(
            f"There is no control {control!r}.{nearest(control, CONTROLS)} "
            f"Valid controls: {', '.join(CONTROLS)} (or null)."
        )


def select_rows(mean_coefficients: Tensor, ratio: float) -> Tensor:
    """Rows at or below the `ratio`-quantile of their layer's coefficients.

    Args:
        mean_coefficients: C̄ [n_layers, m], non-negative, any real dtype and scale.
        ratio: p in (0, 1].

    Returns:
        bool [n_layers, m]; floor(p (m − 1)) + 1 rows are true in each layer, with m its own
        memories, more only where coefficients tie with the threshold.

    Raises:
        UserError: the ratio is out of range, or C̄ is not a finite, non-negative matrix.
    """
    check_parameters(ratio, 1.0)
    coefficients = _checked(mean_coefficients)
    ascending = coefficients.sort(dim=-1).values  # NaN, where a layer has no memory, comes last
    last = [math.floor(ratio * max(own - 1, 0)) for own in _num_memories(coefficients).tolist()]
    return coefficients <= ascending.gather(
        -1, torch.tensor(last, device=ascending.device)[:, None]
    )


def dead_rows(mean_coefficients: Tensor) -> Tensor:
    """Memories whose coefficient is zero for this purpose: C̄_i ≤ 1e-12 · mean(C̄).

    Returns:
        bool [n_layers, m]; all true in a layer that is zero throughout.

    Raises:
        UserError: C̄ is not a finite, non-negative matrix.
    """
    coefficients = _checked(mean_coefficients)
    return coefficients <= DEAD_RELATIVE * coefficients.nanmean(dim=-1, keepdim=True)


def multipliers(
    mean_coefficients: Tensor,
    ratio: float,
    factor: float,
    *,
    control: Control | str | None = None,
    seed: int = 0,
    up_row_norms: Tensor | None = None,
) -> Tensor:
    """The factor for every row of every layer's up projection.

    Without a control, Algorithm 1. The controls change the same weights by as much, without what
    the algorithm claims to work by:

    ``random``
        In each layer as many rows, drawn uniformly without replacement from all m, get the same
        multipliers in random order. Size and number of changes are kept; which memories are
        raised is not. Drawn from PCG64 seeded with (seed, layer).

    ``matched_norm``
        Every row of layer l is multiplied by the one number that gives the whole up projection
        the Frobenius norm it would have after Algorithm 1,

            s_l = sqrt( Σ_i u_i² ‖K_i‖² / Σ_i ‖K_i‖² ).

        The growth of the weights is kept; the shares of the memories, hence the knowledge entropy
        for unchanged inputs, stay exactly as they were.

    Args:
        mean_coefficients: C̄ [n_layers, m], non-negative, any real dtype and scale.
        ratio: p in (0, 1].
        factor: q above 0.
        control: None, 'random' or 'matched_norm'.
        seed: of the random control.
        up_row_norms: ‖K_i‖ [n_layers, m], the Euclidean norms of the up projection's rows, 0 where
            there is none; needed by 'matched_norm' only.

    Returns:
        float64 [n_layers, m] on the input's device, finite and above 0; 1 where nothing changes.

    Raises:
        UserError: a parameter is out of range, or C̄ is not a finite, non-negative matrix.
        ValueError: 'matched_norm' without norms of the right shape.
    """
    check_parameters(ratio, factor, control)
    coefficients = _checked(mean_coefficients)
    scaled = select_rows(coefficients, ratio) & ~dead_rows(coefficients)
    mean = coefficients.nanmean(dim=-1, keepdim=True)
    # The inner `where` keeps 0/0 out of the rows that are not scaled.
    raised = factor * (mean / torch.where(scaled, coefficients, 1.0))
    result = torch.where(scaled, raised, 1.0)
    if control == "random":
        selected = select_rows(coefficients, ratio)
        return _shuffled(result, selected, _num_memories(coefficients).tolist(), seed)
    if control == "matched_norm":
        return torch.where(coefficients.isnan(), 1.0, _matched_norm(result, up_row_norms))
    return result


def predicted_coefficients(mean_coefficients: Tensor, row_multipliers: Tensor) -> Tensor:
    """C̄' = u · C̄: the coefficients after scaling, with every layer's inputs held fixed.

    Args:
        mean_coefficients: C̄ [n_layers, m].
        row_multipliers: u [n_layers, m], as from `multipliers`.

    Returns:
        float64 [n_layers, m]; see the module docstring for where this is exact.

    Raises:
        UserError: C̄ is not a finite, non-negative matrix.
        ValueError: the shapes differ.
    """
    coefficients = _checked(mean_coefficients)
    if row_multipliers.shape != coefficients.shape:
        raise ValueError(
            f"multipliers have shape {tuple(row_multipliers.shape)}, coefficients "
            f"{tuple(coefficients.shape)}; they must be alike"
        )
    return coefficients * row_multipliers.to(coefficients).abs()


def predicted_entropy_nats(mean_coefficients: Tensor, row_multipliers: Tensor) -> Tensor:
    """Knowledge entropy per layer of `predicted_coefficients`; its sum is the model's.

    Returns:
        float64 [n_layers], nats, in [0, ln m]; 0 for a layer without memories, NaN for one that is
        zero throughout.

    Raises:
        UserError, ValueError: as `predicted_coefficients`.
    """
    predicted = predicted_coefficients(mean_coefficients, row_multipliers)
    entropy = entropy_nats(predicted.nan_to_num())
    return torch.where(_num_memories(predicted) > 0, entropy, 0.0)


def _checked(mean_coefficients: Tensor) -> Tensor:
    """The coefficients in float64."""
    if mean_coefficients.ndim != 2 or mean_coefficients.shape[-1] < 1:
        raise UserError(
            f"The mean coefficients have shape {tuple(mean_coefficients.shape)}; expected "
            "[n_layers, d_mlp], as a scan writes them."
        )
    coefficients = mean_coefficients.detach().to(torch.float64)
    beyond = torch.arange(coefficients.shape[1], device=coefficients.device)
    is_memory = beyond < _num_memories(coefficients)[:, None]
    bad = is_memory & (~torch.isfinite(coefficients) | (coefficients < 0.0))
    if bool(bad.any()):
        layer = int(bad.any(dim=-1).nonzero()[0])
        raise UserError(
            f"The mean coefficients of layer {layer} hold {int(bad[layer].sum())} negative or "
            "non-finite values; expected means of absolute values from a successful scan."
        )
    return coefficients


def _num_memories(coefficients: Tensor) -> Tensor:
    """Memories of each layer: what stands before the NaN at its end."""
    columns = torch.arange(1, coefficients.shape[1] + 1, device=coefficients.device)
    return torch.where(coefficients.isnan(), 0, columns).amax(dim=-1)


def _shuffled(result: Tensor, selected: Tensor, num_memories: list[int], seed: int) -> Tensor:
    """The selected rows' multipliers on other rows, chosen at random in each layer."""
    values, is_selected = result.cpu().numpy(), selected.cpu().numpy()
    shuffled = np.ones_like(values)
    for layer in range(values.shape[0]):
        generator = np.random.Generator(np.random.PCG64([seed, layer]))
        amounts = generator.permutation(values[layer, is_selected[layer]])
        rows = generator.permutation(num_memories[layer])[: amounts.size]
        shuffled[layer, rows] = amounts
    return torch.from_numpy(shuffled).to(result.device)


def _matched_norm(result: Tensor, up_row_norms: Tensor | None) -> Tensor:
    """One multiplier per layer, with the Frobenius norm that `result` would give."""
    if up_row_norms is None or up_row_norms.shape != result.shape:
        given = None if up_row_norms is None else tuple(up_row_norms.shape)
        raise ValueError(
            "the control 'matched_norm' needs the norms of the up projection's rows, of shape "
            f"{tuple(result.shape)}; got {given}"
        )
    squares = up_row_norms.to(result).square()
    before = squares.sum(dim=-1, keepdim=True)
    after = (squares * result.square()).sum(dim=-1, keepdim=True)
    common = torch.where(before > 0.0, (after / before).sqrt(), 1.0)
    return common.expand_as(result).clone()
