"""Resuscitation of a starting checkpoint in memory, with what is predicted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ke_ray.studies.parts import Resuscitation

if TYPE_CHECKING:
    from ke_ray.checkpoints.reference import CheckpointRef


@dataclass(frozen=True)
class Revived:
    """What is known of a model that was resuscitated in memory.

    Attributes:
        before_nats, predicted_nats: knowledge entropy by layer of C̄ and, inputs of every layer held
            fixed, of u · C̄; empty for the attention control, which scales no memory.
        notes: tags about the coefficients.
    """

    before_nats: list[float] = field(default_factory=list)
    predicted_nats: list[float] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def predicted_entropy_nats(self) -> float | None:
        """The predicted total over layers."""
        return sum(self.predicted_nats) if self.predicted_nats else None


def revive(
    model: Any,
    folder: str,
    ref: CheckpointRef,
    measure: Callable[[Any], Any],
    keys: Resuscitation,
) -> Revived:
    """Change ``model`` in place as ``keys`` say.

    Args:
        model: as loaded from ``folder``.
        measure: gives the model's C̄ [n_layers, d_mlp] where ``keys`` name no coefficients.

    Raises:
        ResultsError: the coefficients are those of other weights.
        UserError: ratio, factor or control are not valid for this model.
    """
    import torch

    from ke_ray.core.entropy import entropy_nats
    from ke_ray.core.resuscitation import predicted_entropy_nats
    from ke_ray.resuscitation.apply import apply_attention_temperature, resuscitate

    if keys.control == "attention_temperature":
        apply_attention_temperature(model, keys.factor)
        return Revived()
    if keys.coefficients is None:
        mean, notes = measure(model), {"coefficients": "measured before"}
    else:
        from ke_ray.checkpoints.formats.fingerprint import weights_sha256
        from ke_ray.resuscitation.coefficients import find_coefficients

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
    mean, rows = mean.double().cpu(), rows.cpu()
    predicted = predicted_entropy_nats(mean, rows).tolist()
    return Revived(entropy_nats(mean).tolist(), predicted, notes)
