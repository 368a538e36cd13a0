"""Resuscitation of a starting checkpoint in memory, with what is predicted of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ke_ray.studies.parts import Resuscitation

if TYPE_CHECKING:
    from ke_ray.models.reference import CheckpointRef

__all__ = ["revive"]


def revive(
    model: Any,
    folder: str,
    ref: CheckpointRef,
    measure: Callable[[Any], Any],
    keys: Resuscitation,
) -> tuple[float | None, dict[str, str]]:
    """Change ``model`` in place as ``keys`` say.

    Args:
        model: as loaded from ``folder``.
        measure: gives the model's C̄ [n_layers, d_mlp] where ``keys`` name no coefficients.

    Returns:
        The knowledge entropy predicted with layer inputs held fixed (nats; None for the attention
        control, which scales no memory), and tags about the coefficients.

    Raises:
        ResultsError: the coefficients are those of other weights.
        UserError: ratio, factor or control are not valid for this model.
    """
    import torch

    from ke_ray.core.resuscitation import predicted_entropy_nats
    from ke_ray.models.resuscitate import apply_attention_temperature, resuscitate

    if keys.control == "attention_temperature":
        apply_attention_temperature(model, keys.factor)
        return None, {}
    if keys.coefficients is None:
        mean, notes = measure(model), {"coefficients": "measured on the entropy corpus"}
    else:
        from ke_ray.models.fingerprint import weights_sha256
        from ke_ray.results.coefficients import find_coefficients

        found = find_coefficients(
            keys.coefficients,
            weights_sha256=weights_sha256(folder),
            checkpoint=ref.name,
            allow_mismatch=keys.allow_mismatch,
        )
        mean = torch.from_numpy(found.values)
        notes = {"coefficients": found.source, "coefficients_verified": str(found.verified)}
    rows = resuscitate(
        model, mean, ratio=keys.ratio, factor=keys.factor, control=keys.control, seed=keys.seed
    )
    predicted = predicted_entropy_nats(mean.cpu(), rows.cpu()).sum()
    return float(predicted), notes
