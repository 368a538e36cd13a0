"""YAML that somebody else wrote, parsed within limits.

Study files, OLMo's configurations and descriptions of its data order are read through here.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ke_ray.errors import ConfigError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A safe loader that reads ``4e-4`` as a number (YAML 1.1 takes it for a word)."""


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


def parse_yaml(text: str, where: str, *, max_characters: int = _MAX_YAML_CHARACTERS) -> Any:
    """Parse YAML text; ``where`` names it in the message.

    Raises:
        ConfigError: not YAML, aliases (a few bytes of which can stand for gigabytes), too big or
            nested too deeply.
    """
    if len(text) > max_characters:
        raise ConfigError(
            f"{where} has {len(text):,} characters; expected at most {max_characters:,}."
        )
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.AliasToken):
                raise ConfigError(f"{where} uses YAML aliases (*name); write the values out.")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _MAX_YAML_DEPTH:
                raise ConfigError(f"{where} is nested deeper than {_MAX_YAML_DEPTH} levels.")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader, made above)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML raises many kinds: `!!bool x` is a KeyError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}{line} is not valid YAML: {problem:.200}.") from error
