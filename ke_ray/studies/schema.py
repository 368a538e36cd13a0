"""The kinds of study files, and their JSON Schemas for editors.

    python -m ke_ray.studies.schema        writes sweeps/schema/KIND.json; a test compares

A study begins with ``# yaml-language-server: $schema=schema/KIND.json``, by which editors complete
its keys and show what they mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ke_ray.shipped import shipped_folder
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.jobs import JobStudy
from ke_ray.studies.scan import ScanStudy
from ke_ray.studies.sweep import SweepStudy
from ke_ray.studies.training import PretrainStudy

KINDS: dict[str, type[BaseModel]] = {
    "scan": ScanStudy,
    "pretrain": PretrainStudy,
    "continual": ContinualStudy,
    "sweep": SweepStudy,
    "job": JobStudy,
}


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of the study files of a kind."""
    schema = KINDS[kind].model_json_schema()
    if kind == "sweep":
        _allow_short_forms(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _allow_short_forms(schema: dict[str, Any]) -> None:
    """What ``load_sweep`` and validators read besides the schema's own form."""
    keys, definitions = schema["properties"], schema["$defs"]
    keys["base"]["anyOf"] = [{"type": "string"}, {"$ref": keys["base"].pop("$ref")}]
    keys["changes"] = {"type": "object", "description": "key → value, set in the base"}
    keys["objectives"]["items"] = {"anyOf": [{"type": "string"}, keys["objectives"]["items"]]}
    axis = keys["space"]["additionalProperties"]
    keys["space"]["additionalProperties"] = {"anyOf": [{"type": "array"}, axis]}
    definitions["ContinualStudy"]["required"].remove("output")  # trials write into the sweep's


def schema_file(kind: str) -> Path:
    """Where the schema of a kind ships."""
    return shipped_folder("sweeps") / "schema" / f"{kind}.json"


def schema_text(kind: str) -> str:
    """The content of that file."""
    return json.dumps(json_schema(kind), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the files anew."""
    for kind in KINDS:
        schema_file(kind).parent.mkdir(exist_ok=True)
        schema_file(kind).write_text(schema_text(kind), encoding="utf-8")


if __name__ == "__main__":
    main()
