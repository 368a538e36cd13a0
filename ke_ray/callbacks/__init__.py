"""Knowledge entropy of a live model, while it is being trained.

    Monitor                     measures a model in any training loop
    TrainerMonitor              the same as a callback of transformers' Trainer
    LightningMonitor            the same as a callback of Lightning's Trainer

Importing this package imports nothing heavy: each comes with what it is used with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ke_ray.callbacks.lightning import LightningMonitor
    from ke_ray.callbacks.monitor import Monitor
    from ke_ray.callbacks.trainer import TrainerMonitor

__all__ = ["LightningMonitor", "Monitor", "TrainerMonitor"]

_MODULES = {"Monitor": "monitor", "TrainerMonitor": "trainer", "LightningMonitor": "lightning"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'ke_ray.callbacks' has no attribute {name!r}")
    return getattr(import_module(f"ke_ray.callbacks.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
