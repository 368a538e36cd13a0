"""The JSON Schemas that ship for editors, and what they say of the studies that ship."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from ke_ray.cli import app
from ke_ray.shipped import MODELINE, list_shipped, shipped_folder
from ke_ray.studies.schema import KINDS, json_schema, schema_file, schema_text

JOBS = [shipped_folder("jobs") / f"{name}.yaml" for name in ("scan", "sweep", "pretrain")]
FILES = [study.path for study in list_shipped()] + JOBS


class Numbers(yaml.SafeLoader):
    """Reads 1e-3 as a number, as editors do (YAML 1.2)."""


Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?$"), list("0123456789")
)


def problems(values: Any) -> list[str]:
    checker = jsonschema.Draft202012Validator(json_schema(values["kind"]))
    return [error.json_path for error in checker.iter_errors(values)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_that_ship_are_those_of_the_code(kind: str) -> None:
    assert schema_file(kind).read_text(encoding="utf-8") == schema_text(kind), (
        "run: python -m ke_ray.studies.schema"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_names_its_schema_and_fulfils_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    values = yaml.load(text, Numbers)  # noqa: S506
    (named,) = re.findall(rf"^# {re.escape(MODELINE)}(\S+)$", text, re.M)
    assert (file.parent / named).resolve() == schema_file(values["kind"]).resolve()
    assert problems(values) == []


def test_what_a_study_may_not_say_is_seen() -> None:
    study = {"kind": "scan", "checkpoints": {"spec": "x"}, "data": {"d": "y"}, "output": "o"}
    assert problems(study) == []
    assert problems(study | {"batch_size": 0}) == ["$.batch_size"]
    assert problems(study | {"measure": "gini"}) == ["$"]
    sweep = {"kind": "sweep", "base": "b.yaml", "output": "o"}
    assert problems(sweep) == []
    assert problems(sweep | {"space": {"seed": 3}}) == ["$.space.seed"]


def test_the_command_prints_it_and_refuses_another_kind() -> None:
    done = CliRunner().invoke(app, ["schema", "scan"])
    assert json.loads(done.stdout) == json_schema("scan")
    wrong = CliRunner().invoke(app, ["schema", "scann"])
    assert "Did you mean 'scan'?" in str(wrong.exception)


def test_a_copy_of_a_study_still_finds_the_schema(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    assert CliRunner().invoke(app, ["init", "olmo_1b", "-o", str(copy)]).exit_code == 0
    (named,) = re.findall(rf"^# {re.escape(MODELINE)}(\S+)$", copy.read_text(), re.M)
    assert (tmp_path / named).resolve() == schema_file("scan").resolve()
    assert (
        copy.read_text().partition("\n")[2]
        == ((shipped_folder("sweeps") / "olmo_1b.yaml").read_text().partition("\n")[2])
    )


def test_the_shell_completes_the_keys_of_a_study() -> None:
    words = {"COMP_WORDS": "ke-ray sweep table1 --set base.opt", "COMP_CWORD": "4"}
    done = subprocess.run(
        [Path(sys.executable).with_name("ke-ray")],
        env=os.environ | words | {"_KE_RAY_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "base.optimizer.learning_rate=" in done.stdout.split()
