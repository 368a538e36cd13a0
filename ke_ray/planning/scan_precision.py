"""Precision of a scan: what ``auto`` is on the devices at hand, settled before identity is.

One scan has one precision: all scorers, and all later runs into the same folder, use it. The
entropy of a checkpoint differs a little between dtypes, and a change of dtype along a series would
look like a change of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ke_ray.errors import ResultsError
from ke_ray.studies.scan import ScanStudy

log = logging.getLogger(__name__)

#: Whether all GPUs of a scan have units for bfloat16 and TF32; None where it has no GPU.
Gpus = Callable[[], bool | None]


def local_gpus() -> bool | None:
    """Whether this machine's GPU has units for bfloat16 and TF32; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.is_bf16_supported(including_emulation=False)


def settle_precision(study: ScanStudy, gpus: Gpus) -> ScanStudy:
    """The study with a dtype and a precision of products where it says ``auto``.

    Args:
        gpus: asked only where the answer matters.
    """
    open_keys = [key for key in ("dtype", "matmul_precision") if getattr(study, key) == "auto"]
    if not open_keys:
        return study
    has_units = None if study.device == "cpu" else gpus()
    if has_units is None:
        reason = "no GPU scores"
        if study.device == "cuda":
            has_units, reason = True, "GPUs with bfloat16 are expected"
    else:
        reason = "the GPUs have bfloat16" if has_units else "a GPU has no bfloat16"
    values: dict[str, Any] = {}
    if "dtype" in open_keys:
        values["dtype"] = "bfloat16" if has_units else "float32"
    if "matmul_precision" in open_keys:
        has_products = has_units and values.get("dtype", study.dtype) == "float32"
        values["matmul_precision"] = "high" if has_products else "highest"
    shown = ", ".join(f"{key} {value}" for key, value in values.items())
    log.info("Precision 'auto' is %s here: %s.", shown, reason)
    return study.model_copy(update=values)


def check_precision(
    output: str, stored: Mapping[str, Any], study: ScanStudy, settled: ScanStudy
) -> None:
    """Refuse to continue a folder in another precision, also where ``auto`` is another one here.

    Args:
        stored: the identity of the folder.
        study: as it was given.
        settled: the same without ``auto``.

    Raises:
        ResultsError: names the option that continues the folder as it began.
    """
    for key, default in (("dtype", "float32"), ("matmul_precision", "highest")):
        before, now = stored.get(key, default), getattr(settled, key)
        if before != now:
            reason = " (auto, on the devices at hand)" if getattr(study, key) == "auto" else ""
            raise ResultsError(
                f"'{output}' holds results with {key} {before}, this run has {now}{reason}: they "
                f"cannot be mixed. Continue with --set {key}={before}, or choose another output "
                "folder."
            )
