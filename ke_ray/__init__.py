"""Knowledge entropy, resuscitation and continual knowledge learning over checkpoint series.

    series         iterate over the checkpoints of a series as models (``ke_ray.api.series``)
    scan           run a scan (``ke_ray.api.scan``)
    score_model    measure a loaded model (``ke_ray.api.score``)
    callbacks      measure a model while it is trained (``ke_ray.callbacks``)

The numerics need torch alone (``ke_ray.core``, ``ke_ray.models``); Ray stays in ``ke_ray.engine``.
Importing this package imports nothing heavy: these are imported when first used.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

__all__ = ["__version__", "scan", "score_model", "series"]  # types: __init__.pyi

_MODULES = {"scan": "scan", "score_model": "score", "series": "series"}


def __getattr__(name: str) -> object:
    if name == "callbacks":
        return import_module("ke_ray.callbacks")
    if name not in _MODULES:
        raise AttributeError(f"module 'ke_ray' has no attribute {name!r}")
    return getattr(import_module(f"ke_ray.api.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "callbacks"})
