"""Strict, frozen configuration from YAML.

Every study file is validated against a schema (``ke_ray.studies``): an unknown key or a wrong type
is one message that names the file, the key and the nearest valid one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ke_ray import storage
from ke_ray.errors import ConfigError, UserError, nearest
from ke_ray.storage.safe_yaml import parse_yaml

StudyT = TypeVar("StudyT", bound=BaseModel)


class Strict(BaseModel):
    """Base of every schema: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def Key(default: Any = ..., *, affects_result: bool = True, **options: Any) -> Any:  # noqa: N802
    """Declare a key of a study: pydantic's ``Field``, and whether it can change a result.

    Args:
        default: ``...`` makes the key required.
        affects_result: False for keys that say how, where or under which name a study runs. They
            are not part of a study's identity and cannot be swept.
        options: as ``pydantic.Field`` takes them.
    """
    return Field(default, json_schema_extra={"affects_result": affects_result}, **options)


def set_keys(
    values: Mapping[str, Any], keys: Mapping[str, Any], source: str = "the study"
) -> dict[str, Any]:
    """Copy ``values`` and set each dotted key; groups that are absent or null are created.

    Raises:
        ConfigError: a parent of a key is not a group.
    """
    result: dict[str, Any] = dict(values)
    for key, value in keys.items():
        *parents, last = key.split(".")
        group = result
        for parent in parents:
            child = group.get(parent)
            if child is not None and not isinstance(child, Mapping):
                raise ConfigError(
                    f"{source}: cannot set '{key}': '{parent}' is {child!r:.200}, not a group of "
                    "keys."
                )
            group[parent] = dict(child or {})
            group = group[parent]
        group[last] = value
    return result


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse ``a.b=c`` texts into dotted key → value; ``c`` is read as YAML.

    Raises:
        ConfigError: an override without ``=``, or a value that is not YAML.
    """
    keys: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set '{override}' is not KEY=VALUE (for example seed=3).")
        keys[key.strip()] = parse_yaml(text, f"--set '{override}'")
    return keys


def _fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The valid keys of the schema at ``path``; empty where that is not a schema."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        options += [a for o in options for a in getattr(o, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and _keys_of(o)), None)
    return sorted(_keys_of(current))


def _keys_of(schema: Any) -> Mapping[str, Any]:
    """The fields of a model or of a dataclass; empty for anything else."""
    return getattr(schema, "model_fields", None) or getattr(schema, "__dataclass_fields__", {})


def describe_problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe up to five problems of a failed validation, with the nearest valid keys."""
    clauses = []
    for item in error.errors()[:5]:
        path = [part for part in item["loc"] if not str(part).startswith("function-")]
        name = f"{'.'.join(str(part) for part in path):.100}"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            valid = _fields_at(model, path[:-1])
            hint = nearest(str(path[-1]), valid)
            listing = f" Valid keys: {', '.join(valid)}." if valid and not hint else ""
            clauses.append(f"unknown key '{name}'.{hint}{listing}")
        elif item["type"] == "missing":
            clauses.append(f"'{name}' is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = "" if isinstance(given, dict | list) else f" (given: {given!r:.200})"
            clauses.append(f"'{name}': {message}{shown}" if name else f"{message}{shown}")
    return "; ".join(clauses)


def validate(
    model: type[StudyT], values: Any, source: str, error_type: type[UserError] = ConfigError
) -> StudyT:
    """Validate ``values`` against ``model``.

    Args:
        source: names the file, or the part of it, in messages.
        error_type: of the error: ``DataError`` for files that are not studies.

    Raises:
        UserError: of ``error_type``, with every problem (at most five) in one message.
    """
    if not isinstance(values, Mapping):
        raise error_type(f"{source} holds {type(values).__name__}, expected a mapping of keys.")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise error_type(f"{source}: {describe_problems(error, model)}") from error
    except UnicodeEncodeError as error:
        raise error_type(
            f"{source} holds half of a surrogate pair (such as \\ud83d alone): no character."
        ) from error


def load_study(
    path: str | os.PathLike[str], model: type[StudyT], overrides: Sequence[str] = ()
) -> StudyT:
    """Read a study file, apply overrides, and validate it.

    Args:
        path: path or URI of a YAML file.
        model: its schema; where it has a ``kind``, the file must have the same.
        overrides: ``a.b=c`` texts, as given by ``--set``.

    Raises:
        ConfigError: no such file, not YAML, another kind of study, unknown key, wrong type.
    """
    source = os.fspath(path)
    values = read_yaml(source, "a study file")
    kind_field = model.model_fields.get("kind")
    if kind_field is not None:
        expected, given = kind_field.default, values.get("kind")
        if given != expected:
            raise ConfigError(
                f"{source} has kind {given!r}; expected a study with 'kind: {expected}'."
            )
    return validate(model, set_keys(values, parse_overrides(overrides), source), source)


def read_yaml(path: str, what: str) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Args:
        path: path or URI.
        what: names the kind of file in messages, as "a study file".

    Raises:
        ConfigError: no such file, not readable, not YAML, or not a mapping.
    """
    try:
        text = storage.read_text(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file '{path}'; expected {what}.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"'{path:.300}' cannot be read as {what}: {reason}.") from error
    values = parse_yaml(text, path)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds {type(values).__name__}, expected a mapping of keys.")
    return dict(values)
