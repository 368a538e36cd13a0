"""Strict, frozen configuration from YAML.

Every study file is validated against a schema (``ke_ray.studies``): an unknown key or a wrong type
is one message that names the file, the key and the nearest valid one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ke_ray import storage
from ke_ray.errors import ConfigError, UserError, nearest

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


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader that reads ``4e-4`` as a number (in YAML 1.1 it is a text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number that Python can print: it refuses to write out more than 4,300 digits."""
    if len(node.value) > _MAX_INT_CHARACTERS:
        raise ValueError(f"a whole number of {len(node.value)} characters")
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)

_OPENING = (
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
_MAX_YAML_CHARACTERS = 4 << 20
_MAX_INT_CHARACTERS = 1000
_MAX_YAML_DEPTH = 64  # a study has five levels; the C parser has no limit but its stack


def parse_yaml(text: str, source: str, *, max_characters: int = _MAX_YAML_CHARACTERS) -> Any:
    """Parse YAML text; ``source`` names it in messages.

    Raises:
        ConfigError: not YAML, aliases (a few bytes of which can stand for gigabytes), too big or
            nested too deeply.
    """
    if len(text) > max_characters:
        raise ConfigError(
            f"{source} has {len(text)} characters; at most {max_characters >> 20} MiB are read."
        )
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.AliasToken):
                raise ConfigError(f"{source} uses YAML aliases (*name); write the values out.")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _MAX_YAML_DEPTH:
                raise ConfigError(f"{source} is nested deeper than {_MAX_YAML_DEPTH} levels.")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader, made above)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML raises many kinds: `!!bool x` is a KeyError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"{source}{line} is not valid YAML: {problem:.200}.") from error


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
        current = next(
            (o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None
        )
    return sorted(getattr(current, "model_fields", {}))


def describe_problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe up to five problems of a failed validation, with the nearest valid keys."""
    clauses = []
    for item in error.errors()[:5]:
        path = [part for part in item["loc"] if not str(part).startswith("function-")]
        name = f"{'.'.join(str(part) for part in path):.100}"
        if item["type"] == "extra_forbidden":
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
