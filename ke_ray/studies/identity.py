"""Identity of a study: the keys that can change its result, and no others.

Every key declares whether it affects a result (``ke_ray.config.Key``). A key at its default is left
out, so that a new key whose default keeps the previous behaviour changes no identity. Changing a
default requires a new ``IDENTITY_VERSION``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ke_ray.core.architecture import Architecture
from ke_ray.errors import ResultsError
from ke_ray.secrets import redact
from ke_ray.studies.own_measure import OwnMeasure

IDENTITY_VERSION = 3


def affects_result(field: FieldInfo) -> bool:
    """Whether a key of a study can change a result."""
    extra = field.json_schema_extra
    return not isinstance(extra, Mapping) or extra.get("affects_result") is not False


def identity_keys(study: BaseModel, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The keys of a study that affect its result and are not at their defaults, without secrets.

    Args:
        study: a study, or a group of its keys.
        without: further keys of the study itself to leave out.

    Returns:
        Plain JSON values, nested as the study is.
    """
    keys: dict[str, Any] = redact(_plain(study))
    return {name: value for name, value in keys.items() if name not in without}


def identity(keys: Any) -> str:
    """Hex sha256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def identity_fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest that hold the identity of its study."""
    return {
        "identity": identity(keys),
        "identity_version": IDENTITY_VERSION,
        "identity_keys": keys,
    }


def check_same_study(output: str, manifest: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """Refuse to continue another study in the same folder.

    Args:
        output: the folder, for the message.
        manifest: of the folder.
        keys: ``identity_keys`` of the study that is to run.

    Raises:
        ResultsError: the folder holds another study, or was written by a version of ke_ray that
            defined identity differently.
    """
    if manifest.get("identity_version") != IDENTITY_VERSION:
        version = (manifest.get("versions") or {}).get("ke_ray", "unknown")
        raise ResultsError(
            f"'{output}' was written by another version of ke_ray ({version}), which compared "
            "studies by other rules, so this version cannot check that the study is the same. Its "
            "results stay readable (ke-ray results, ke-ray report); give another output folder to "
            "run the study, or finish it with the version that started it."
        )
    stored = manifest.get("identity_keys") or {}
    if identity(stored) != identity(keys):
        raise ResultsError(
            f"'{output}' holds another study: {_changes(stored, keys)}. Give another output "
            "folder, or restore the study."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        keys = {}
        for name, field in type(value).model_fields.items():
            if affects_result(field):
                plain = _plain(getattr(value, name))
                if field.is_required() or plain != _plain(
                    field.get_default(call_default_factory=True)
                ):
                    keys[name] = plain
        return keys
    if isinstance(value, OwnMeasure):
        return f"{value.reference} sha256 {value.sha256}"
    if isinstance(value, Architecture):
        return value.described()
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys that differ, four of them with their values."""
    old, new = _flat(before), _flat(now)
    changes = [
        f"{key} was {_shown(old, key)}, is {_shown(new, key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
    return "; ".join(changes[:4]) + more


def _shown(values: Mapping[str, Any], key: str) -> str:
    return f"{json.dumps(values[key]):.100}" if key in values else "the default"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
