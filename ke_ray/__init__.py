"""Knowledge entropy, resuscitation and continual knowledge learning over checkpoint series.

The numerics need torch alone (``ke_ray.core``, ``ke_ray.models``); Ray stays in ``ke_ray.engine``.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
