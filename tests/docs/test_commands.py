"""Every command block of the documents is one that its program understands as it stands.

ke-ray's own commands go through its parser, with the studies that they name loaded and overridden;
those of other programs that are installed here through theirs. What is not installed here (docker,
kubectl, prometheus) is checked for the files that it names.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from packaging.requirements import Requirement

from ke_ray.cli import app
from ke_ray.config import load_study
from ke_ray.shipped import list_shipped, study_path
from ke_ray.studies.schema import KINDS, schema_file
from ke_ray.studies.sweep import load_sweep

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHIPPED = {study.name for study in list_shipped()}


def blocks(document: str, language: str) -> list[str]:
    found = _FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
    return [code for name, code in found if name == language]


def commands(block: str) -> Iterator[list[str]]:
    """The simple commands of a block, as words, without comments and assignments."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", block.replace("\\\n", " ")).replace("\n", ";")
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;"):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)


def parse(group: Any, arguments: list[str]) -> Any:
    """The context in which click would call the command; raises what a user would be told."""
    context = group.make_context(group.name, list(arguments))
    while hasattr(context.command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def check_ke_ray(arguments: list[str]) -> None:
    context = parse(typer.main.get_command(app), arguments)
    kind, given = context.info_name, context.params
    study = str(given.get("study") or given.get("checkpoints"))
    if kind in KINDS and (study.startswith("sweeps/") or study in SHIPPED):
        path = str(ROOT / study) if study.startswith("sweeps/") else study_path(study)
        overrides = [*(given["overrides"] or ())]
        if given["output"]:
            overrides.append(f"output={given['output']}")
        load = load_sweep if kind == "sweep" else partial(load_study, model=KINDS[kind])
        load(path, overrides=overrides)


def check_python(arguments: list[str]) -> None:
    match arguments:
        case ["-m", "ke_ray", *rest]:
            check_ke_ray(rest)
        case ["-m", module, *_]:
            assert importlib.util.find_spec(module), f"there is no module {module}"
        case [script, *rest]:
            text = (ROOT / script).read_text(encoding="utf-8")
            options = [word.split("=")[0] for word in rest if word.startswith("--")]
            assert [option for option in options if f'"{option}"' not in text] == []


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in arguments[1:]:
        if not word.startswith(("-", ".")):
            requirement = Requirement(word)
            if requirement.name == "ke-ray":
                assert requirement.extras <= extras.keys()


def check_make(arguments: list[str]) -> None:
    subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)


def check_ray(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    parse(cli, arguments)


def check_mlflow(arguments: list[str]) -> None:
    from mlflow.cli import cli

    parse(cli, arguments)


def check_files(arguments: list[str]) -> None:
    named = [word for word in arguments if word.startswith(("jobs/", "sweeps/", "dashboards/"))]
    assert [name for name in named if not (ROOT / name).exists()] == []


CHECKS = {
    "ke-ray": check_ke_ray,
    "python": check_python,
    "pip": check_pip,
    "make": check_make,
    "ray": check_ray,
    "mlflow": check_mlflow,
    **dict.fromkeys(("docker", "kubectl", "prometheus", "export"), check_files),
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    refused = []
    for block in blocks(document, "bash"):
        for program, *arguments in commands(block):
            try:
                CHECKS[program](arguments)
            except Exception as error:
                message = getattr(error, "message", None) or error
                refused.append(f"{shlex.join([program, *arguments])}: {message!r}")
    assert refused == []


@pytest.mark.parametrize(
    "command",
    [
        "ke-ray scam olmo_1b",
        "ke-ray scan olmo_1b --dryrun",
        "ke-ray scan olmo_1b --set num_instance=2 --dry-run",
        "ke-ray sweep sweeps/no_such.yaml",
        "python benchmarks/scale.py --no-such-option",
        "pip install 'ke-ray[s4]'",
        "make dmeo",
        "mlflow sever",
        "ray start --haed",
        "kubectl apply -f jobs/no_such.yaml",
    ],
)
def test_what_is_misspelt_is_refused(command: str) -> None:
    (words,) = commands(command)
    with pytest.raises(BaseException) as refusal:  # noqa: PT011 - of many parsers
        CHECKS[words[0]](words[1:])
    assert not isinstance(refusal.value, (KeyboardInterrupt, ImportError))


def test_every_block_says_what_it_is() -> None:
    languages = {
        (document, name)
        for document in DOCUMENTS
        for name, _ in _FENCE.findall((ROOT / document).read_text(encoding="utf-8"))
    }
    known = {"bash", "python", "yaml", "toml", "text"}
    assert {pair for pair in languages if pair[1] not in known} == set()
    assert {name for _, name in languages} >= {"bash", "python", "yaml"}


def test_studies_in_the_documents_are_valid() -> None:
    kinds = []
    for document in DOCUMENTS:
        for block in blocks(document, "yaml"):
            study = yaml.safe_load(block)
            if "kind" in study:
                kinds.append(study["kind"])
                jsonschema.validate(study, json.loads(schema_file(study["kind"]).read_text()))
        for block in blocks(document, "toml"):
            tomllib.loads(block)
    assert {"sweep", "job"} <= set(kinds)


def test_python_in_the_documents_compiles_and_its_imports_exist() -> None:
    imports = 0
    for document in DOCUMENTS:
        for block in blocks(document, "python"):
            compile(block, document, "exec")
            for module, names in re.findall(r"^from (ke_ray[\w.]*) import (.+)$", block, re.M):
                loaded = importlib.import_module(module)
                imports += 1
                assert [n for n in names.split(", ") if not hasattr(loaded, n)] == []
    assert imports >= 3
