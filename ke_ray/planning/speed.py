"""Speeds that forecasts rest on: measured on this machine, or assumed of an H100.

Facts: an H100's products per second, quoted from NVIDIA's data sheet (licence: none asked for).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

#: Dense products per second by dtype, as its data sheet says; PyTorch uses TF32 only when told to.
H100_FLOPS_PER_S = {
    "bfloat16": 989e12,
    "float16": 989e12,
    "float32 with TF32": 494e12,
    "float32": 67e12,
}


@dataclass(frozen=True)
class Speed:
    """Matrix products per second of one device.

    Attributes:
        device: ``GPU`` or ``CPU``.
        dtype: what was measured: the study's, or float32 where the CPU is faster in that.
        slowdown: how many times slower the study's own dtype is; 1 where it was measured.
    """

    device: str
    dtype: str
    flops_per_s: float
    slowdown: float
    study_dtype: str

    def __str__(self) -> str:
        text = f"{self.flops_per_s / 1e12:.2f} TFLOP/s measured in {self.dtype}"
        if self.dtype != self.study_dtype:
            text += (
                f"; the study's {self.study_dtype} is {self.slowdown:.1f} times slower on this "
                "CPU, so choose float32 here"
            )
        return text


def measured_speed(dtype: str, use_gpu: bool | None = None, products: str = "highest") -> Speed:
    """Measure this machine for a quarter of a second in a study's dtype, on the device it gets.

    A CPU without units for a short dtype emulates it, and nobody would wait for that. There float32
    is measured too, and taken where it is faster.

    Args:
        dtype: of the study: ``float32``, ``bfloat16`` or ``float16``.
        use_gpu: as in studies; None: where there is one.
        products: precision of a GPU's float32 products, as PyTorch calls it.
    """
    import torch

    from ke_ray.core.precision import matmul_precision

    if use_gpu is not False and torch.cuda.is_available():
        with matmul_precision(products):
            return Speed("GPU", dtype, _measured("cuda", dtype), 1.0, dtype)
    own = _measured("cpu", dtype)
    plain = own if dtype == "float32" else _measured("cpu", "float32")
    if own >= plain:
        return Speed("CPU", dtype, own, 1.0, dtype)
    return Speed("CPU", "float32", plain, plain / own, dtype)


def _measured(device: str, dtype: str) -> float:
    import torch

    size = 4096 if device == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    num_products, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.25:
        a = (a @ a).clamp_(-1, 1)
        if device == "cuda":
            torch.cuda.synchronize()
        num_products += 1
    return num_products * 2 * size**3 / (time.perf_counter() - started)
