"""Mean coefficients for resuscitation, looked up by the weights they were measured on."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ke_ray import storage
from ke_ray.errors import ResultsError
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.studies.parts import Resuscitation


@dataclass(frozen=True)
class Coefficients:
    """C̄ of one checkpoint.

    Attributes:
        values: [n_layers, d_mlp] (any common scale for the authors' file).
        source: scan folder with the checkpoint's name, file, or ``measured before``.
        verified: whether they were measured on the very weights (canonical hash).
    """

    values: np.ndarray
    source: str
    verified: bool


def coefficients_of(
    settings: Resuscitation,
    weights_sha256: Callable[[], str],
    checkpoint: str,
    measure: Callable[[], Any] | None = None,
) -> Coefficients | None:
    """The coefficients of a checkpoint that is to be resuscitated as ``settings`` say.

    Args:
        weights_sha256: computes the canonical hash of its weights.
        checkpoint: its name.
        measure: measures C̄ as a tensor [n_layers, d_mlp] where ``settings`` name no coefficients.

    Returns:
        None for the attention control, which needs none.

    Raises:
        ResultsError: the coefficients are those of other weights.
    """
    if settings.control == "attention_temperature":
        return None
    if settings.coefficients is None:
        assert measure is not None, "schemas refuse this"
        return Coefficients(measure().cpu().numpy(), "measured before", verified=True)
    return find_coefficients(
        settings.coefficients,
        weights_sha256=weights_sha256(),
        checkpoint=checkpoint,
        allow_mismatch=settings.allow_mismatch,
    )


def find_coefficients(
    source: str,
    *,
    weights_sha256: str | None,
    checkpoint: str | None = None,
    allow_mismatch: bool = False,
) -> Coefficients:
    """Read coefficients of a checkpoint from a scan folder or the authors' ``.pt`` file.

    In a scan folder the canonical weights hash decides, whatever the checkpoint's name is there.
    The authors' file has no hash: it is taken as it is, unverified.

    Args:
        source: a scan folder (path or URI), or ``mlp_average_coefficients.pt``.
        weights_sha256: canonical hash of the checkpoint that is to be resuscitated.
        checkpoint: its name; used with ``allow_mismatch`` where no hash agrees.
        allow_mismatch: accept coefficients of other weights: those of the same name, or the only
            ones in the folder.

    Raises:
        ResultsError: none fit; the message lists what the folder has.
    """
    if source.endswith((".pt", ".pth", ".bin")):
        return Coefficients(_read_authors_file(source), source, verified=False)
    folder = ScanFolder.open(source)
    # The rows of such a scan have the hash of the files, but C̄ is that of the changed weights.
    is_changed = folder.manifest["identity"].get("resuscitation") is not None
    names: dict[str, str] = {}
    for row in folder.entropy().select(["checkpoint", "weights_sha256", "status"]).to_pylist():
        if row["status"] == "ok" and row["weights_sha256"]:
            names.setdefault(row["checkpoint"], row["weights_sha256"])
    for name, sha256 in names.items():
        if weights_sha256 is not None and sha256 == weights_sha256 and not is_changed:
            return Coefficients(folder.mean_coefficients(name), f"{source}#{name}", True)
    if allow_mismatch:
        fallback = checkpoint if checkpoint in names else None
        if fallback is None and len(names) == 1:
            fallback = next(iter(names))
        if fallback is not None:
            values = folder.mean_coefficients(fallback)
            return Coefficients(values, f"{source}#{fallback}", False)
    available = ", ".join(names) or "none"
    hint = (
        ""
        if allow_mismatch
        else " Scan this checkpoint first, or accept those of other weights with "
        "--allow-mismatch (allow_mismatch: true), which is recorded."
    )
    raise ResultsError(
        f"'{source}' has no coefficients of these weights (weights_sha256 "
        f"{(weights_sha256 or 'unknown')[:12]}…); it has those of: {available}"
        f"{', resuscitated after load' if is_changed else ''}.{hint}"
    )


def _read_authors_file(source: str) -> np.ndarray:
    import torch

    try:
        content: Any = torch.load(
            io.BytesIO(storage.read_bytes(source)), map_location="cpu", weights_only=True
        )
    except FileNotFoundError as error:
        raise ResultsError(f"There is no coefficients file '{source}'.") from error
    except Exception as error:  # torch raises many kinds; a pickle that is no tensor file is one
        raise ResultsError(
            f"'{source}' is not a plain tensor file (torch.load with weights_only=True): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if isinstance(content, dict):
        content = [content[key] for key in sorted(content, key=_layer_number)]
    if isinstance(content, list | tuple) and all(isinstance(t, torch.Tensor) for t in content):
        shapes = {tuple(t.shape) for t in content}
        if len(shapes) == 1:
            content = torch.stack([t.reshape(-1) for t in content])
    if not isinstance(content, torch.Tensor) or content.ndim != 2:
        raise ResultsError(
            f"'{source}' holds {type(content).__name__}, expected mean coefficients as one tensor "
            "[n_layers, d_mlp] or one tensor per layer."
        )
    values = content.float().numpy()
    if not np.isfinite(values).all() or (values < 0).any():
        raise ResultsError(f"'{source}' holds negative or non-finite mean coefficients.")
    return values


def _layer_number(key: Any) -> tuple[int, str]:
    digits = "".join(c for c in str(key) if c.isdigit())
    return (int(digits) if digits else -1, str(key))
