"""Descriptions of decoders that ke_ray's table lacks: a row of the table as YAML.

::

    model_type: seed_oss          # as transformers calls it
    attention: self_attn          # names of modules; what is left out is as in Llama
    up: up_proj

`ke-ray checkpoints SPEC --explain` shows the modules of a checkpoint's class, and what a
description makes of them. Only transformers' own classes are built; code that comes with a
checkpoint never runs.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from ke_ray.config import Strict, read_yaml, validate
from ke_ray.core.architecture import Architecture


def _from_file(value: Any) -> Any:
    return read_yaml(value, "a description of an architecture") if isinstance(value, str) else value


def _named(value: Architecture | None) -> Architecture | None:
    if value is not None and not value.model_type:
        raise ValueError(
            "architecture.model_type is missing: transformers' name of the architecture, as the "
            "checkpoint's config.json has it"
        )
    return value


ArchitectureKey = Annotated[
    Architecture | None, BeforeValidator(_from_file), AfterValidator(_named)
]
"""The key of a study: the row, or the YAML file that holds it."""


class _Holder(Strict):
    architecture: ArchitectureKey = None


def read_architecture(path: str) -> Architecture:
    """Read a description from a file.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type, or no model_type.
    """
    described = validate(_Holder, {"architecture": path}, path).architecture
    assert described is not None, "a path was given"
    return described
