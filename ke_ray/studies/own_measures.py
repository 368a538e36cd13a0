"""Measures of your own from Python files: read once, and carried to every process as text.

A file is given as ``FILE.py:NAME``, NAME being a `Measure` that it declares. What it says counts
for a scan's identity, not where it stands. Measures of installed packages need no file: they are
entry points ``ke_ray.measures`` (`core.measures`).
"""

from __future__ import annotations

import sys
import traceback
from types import ModuleType
from typing import Any

from ke_ray.core.measure import Measure
from ke_ray.core.measures import MEASURES, register, unregister
from ke_ray.errors import UserError
from ke_ray.studies.own_measure import OwnMeasure

_LOADED: dict[str, OwnMeasure] = {}  # by the measure's name
_NAMES: dict[str, str] = {}  # by reference


def use_own_measure(own: OwnMeasure) -> str:
    """Run the file and register the measure in this process; returns the measure's name.

    Every process that scores or evaluates calls it, with the text that the driver read. The same
    text is run once; a file that has changed takes the place of what it said before.

    Raises:
        UserError: the file fails, has no such measure, or the measure's name is taken.
    """
    path, _, attribute = own.reference.rpartition(":")
    for name, earlier in _LOADED.items():
        same = earlier.source == own.source and earlier.reference.endswith(f":{attribute}")
        if same and name in MEASURES:
            _NAMES[own.reference] = name
            return name
    measure = getattr(_run(own, path), attribute, None)
    if not isinstance(measure, Measure):
        kind = "nothing" if measure is None else f"a {type(measure).__name__}"
        raise UserError(
            f"'{path}' has {kind} of the name {attribute!r}; expected a ke_ray.core.measure.Measure"
        )
    if measure.name in MEASURES and _NAMES.get(own.reference) == measure.name:
        unregister(measure.name)
    register(measure)
    _LOADED[measure.name], _NAMES[own.reference] = own, measure.name
    return measure.name


def _run(own: OwnMeasure, path: str) -> ModuleType:
    module = ModuleType(f"ke_ray_own_{own.sha256[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(own.source, path, "exec"), module.__dict__)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1]
        raise UserError(
            f"measure {own.reference!r}: {type(error).__name__} in line {line}: {error}"
        ) from error
    return module


def name_of(reference: str) -> str:
    """The name of the measure that was registered from this reference."""
    return _NAMES[reference]


def origins(names: tuple[str, ...]) -> dict[str, str]:
    """What each of these measures that is not ke_ray's own comes from, for a scan's identity."""
    found: dict[str, str] = {}
    for name in names:
        if name in _LOADED:
            found[name] = f"sha256 {_LOADED[name].sha256}"
        elif name in MEASURES and MEASURES[name].origin:
            found[name] = MEASURES[name].origin
    return found


def loaded(names: tuple[str, ...]) -> tuple[OwnMeasure, ...]:
    """The files of those of these measures that have one."""
    return tuple(_LOADED[name] for name in names if name in _LOADED)


def described(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What a report needs to know of the measures that ke_ray does not have, by name."""
    keys = ("title", "unit", "total", "doc", "direction")
    return {name: {key: getattr(MEASURES[name], key) for key in keys} for name in origins(names)}
