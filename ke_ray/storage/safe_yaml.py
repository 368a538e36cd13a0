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

_OPENING = (
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
_MAX_YAML_BYTES = 4 << 20
_MAX_YAML_DEPTH = 64  # a study has five levels: the C parser has no limit but its stack


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; ``where`` names it in the message.

    Raises:
        ConfigError: not YAML, aliases (a few bytes of which can stand for gigabytes), too big or
            nested too deeply.
    """
    if len(text) > _MAX_YAML_BYTES:
        raise ConfigError(f"{where} has {len(text):,} characters; expected at most 4 MiB of YAML.")
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.AliasToken):
                raise ConfigError(f"{where} uses YAML aliases (*name); write the values out.")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _MAX_YAML_DEPTH:
                raise ConfigError(f"{where} is nested deeper than {_MAX_YAML_DEPTH} levels.")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader, made above)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}.") from error
