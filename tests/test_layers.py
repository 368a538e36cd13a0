"""The layers point one way, and imports are light: shown in fresh processes."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).parents[1] / "ke_ray"


def modules_after(statement: str) -> set[str]:
    """Top-level packages that a statement imports in a fresh process."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr == "", "an import is not silent"
    return set(result.stdout.split())


def all_modules(*folders: str) -> list[str]:
    names = []
    for folder in folders:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize(
    ("folders", "forbidden"),
    [
        (["core"], {"ray", "mlflow", "transformers", "datasets", "pydantic", "optuna", "lm_eval"}),
        (["checkpoints", "models"], {"ray", "mlflow", "pydantic", "optuna", "lm_eval", "datasets"}),
        (["data"], {"ray", "mlflow", "torch", "optuna", "lm_eval"}),
        (["training", "evaluation", "callbacks"], {"ray", "mlflow", "optuna", "lm_eval"}),
        (["report"], {"ray", "mlflow", "torch", "transformers", "optuna", "lm_eval"}),
        (["results", "studies"], {"ray", "mlflow", "torch", "transformers"}),
        (["cli"], {"ray", "mlflow", "torch", "transformers", "pandas", "pyarrow", "matplotlib"}),
    ],
)
def test_no_module_imports_what_its_layer_must_not(folders, forbidden):
    statement = "\n".join(f"import {name}" for name in all_modules(*folders))
    assert modules_after(statement) & forbidden == set()


def test_the_package_itself_imports_nothing():
    assert modules_after("import ke_ray") & {"torch", "numpy", "ray", "yaml", "pydantic"} == set()


def test_callbacks_come_with_what_they_are_used_with():
    statement = "import ke_ray; ke_ray.callbacks.TrainerMonitor; ke_ray.callbacks.Monitor"
    assert modules_after(statement) >= {"torch", "transformers"}
    assert modules_after(statement) & {"ray", "mlflow", "lightning", "lm_eval"} == set()
    light = modules_after("import ke_ray.callbacks")
    assert light & {"torch", "transformers", "lightning", "numpy", "pydantic"} == set()


def test_a_scan_is_set_up_without_torch(tmp_path):
    """The driver needs neither: each costs a second of every command's start."""
    config = {
        "model_type": "olmo",
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
    }
    (tmp_path / "step1").mkdir()
    (tmp_path / "step1" / "config.json").write_text(json.dumps(config))
    (tmp_path / "step1" / "model.safetensors").write_bytes(b"not read")
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3, 4]], np.uint16))
    study = {
        "checkpoints": {"spec": str(tmp_path)},
        "data": {"d": str(tmp_path / "ids.npy")},
        "num_instances": 1,
        "sequence_length": 4,
        "output": str(tmp_path / "out"),
    }
    loaded = modules_after(
        "from ke_ray.planning.scan import prepare_scan\n"
        "from ke_ray.studies.scan import ScanStudy\n"
        f"assert len(prepare_scan(ScanStudy.model_validate({study!r})).works) == 1"
    )
    assert loaded & {"torch", "transformers", "ray", "mlflow"} == set()


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports(path: Path) -> set[str]:
    """Every module that a file imports; ``from package import module`` names the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
    return names


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {module: module_imports(path) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "ke_ray" and len(parts) > 1 else ""


def is_package(module: str) -> bool:
    return module in MODULES and MODULES[module].name == "__init__.py"


def files(*but: str) -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in but
    ]


def test_only_the_engine_imports_ray_anywhere():
    offenders = [
        str(path)
        for path in files("engine")
        if any(name.split(".")[0] == "ray" for name in imports_of(path))
    ]
    assert offenders == []


def test_only_tracking_imports_mlflow_anywhere():
    offenders = [
        str(path)
        for path in files("tracking")
        if any(name.split(".")[0] == "mlflow" for name in imports_of(path))
    ]
    assert offenders == []


#: What a room may import stands on the lines above it (and in its own room).
ORDER = (
    ("secrets",),
    ("errors", "outcomes"),
    ("progress",),
    ("storage",),
    ("config",),
    ("core",),
    ("results",),
    ("studies", "checkpoints"),
    ("data",),
    ("models", "tracking", "report"),
    ("evaluation",),
    ("resuscitation",),
    ("training",),
    ("planning",),
    ("engine", "callbacks"),
    ("api",),
    ("cli",),
)


def test_rooms_import_only_what_lies_above_them() -> None:
    rank = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    offenders = []
    for module, imported in IMPORTS.items():
        own = room_of(module)
        if own not in rank:
            continue
        for name in imported:
            other = room_of(name)
            if other != own and rank.get(other, -1) >= rank[own]:
                offenders.append(f"{module} imports {name}")
    assert offenders == []


def test_there_is_no_circle_of_imports() -> None:
    """Imports inside functions and for typing alone count: a reader has to follow them too."""
    graph = {module: names & set(IMPORTS) for module, names in IMPORTS.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_module_of_the_engine_needs_ray() -> None:
    """It imports Ray, or a module of the engine that does; anything else lives elsewhere."""
    needing = {
        module for module, names in IMPORTS.items() if "ray" in {n.split(".")[0] for n in names}
    }
    engine = {
        module for module in IMPORTS if room_of(module) == "engine" and not is_package(module)
    }
    while more := {m for m in engine - needing if IMPORTS[m] & needing}:
        needing |= more
    assert engine - needing == set()


def test_core_and_models_need_neither_ray_nor_pydantic_to_score():
    statement = """
for name in ("ray", "pydantic", "mlflow", "optuna", "lm_eval"):
    sys.modules[name] = None  # an import of it fails from here on
import torch
from transformers import OlmoConfig, OlmoForCausalLM
from ke_ray.models.scoring import score_model
model = OlmoForCausalLM(OlmoConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, eos_token_id=0)).eval()
evaluation = score_model(model, torch.randint(2, 32, (4, 8)))
assert evaluation.row('knowledge_entropy').value > 0
"""
    assert "torch" in modules_after(statement)


def test_only_packages_say_what_they_export() -> None:
    """A module's public names are those without an underscore; a list of them says nothing more."""
    offenders = [
        str(path.relative_to(PACKAGE))
        for path in files()
        if path.name != "__init__.py" and re.search(r"^__all__\b", path.read_text(), re.MULTILINE)
    ]
    assert offenders == []


#: What a light path may want to do without: each costs a tenth of a second or more.
HEAVY = {
    *("torch", "transformers", "ray", "mlflow", "pandas", "pyarrow", "scipy", "datasets"),
    *("lm_eval", "huggingface_hub", "altair", "vl_convert", "streamlit", "optuna", "tokenizers"),
    *(
        "safetensors",
        "fsspec",
        "aiohttp",
        "requests",
        "rich",
        "yarl",
        "pydantic",
        "numpy",
        "playwright",
    ),
}


def imports_by_time(path: Path) -> tuple[set[str], set[str]]:
    """What a file imports when it is imported itself, and what inside functions."""
    early: set[str] = set()
    late: set[str] = set()

    def visit(node: ast.AST, names: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module and not child.level:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    names.add(full if full in MODULES else child.module)
            elif isinstance(child, ast.Import):
                names |= {alias.name for alias in child.names}
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                visit(child, late if is_function else names)

    visit(ast.parse(path.read_text()), early)
    return early, late


EARLY = {module: imports_by_time(path)[0] for module, path in MODULES.items()}


def heavy_packages(module: str) -> set[str]:
    """The heavy packages that come with a module of ours."""
    seen: set[str] = set()
    heavy: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in MODULES:
            heavy |= {name.split(".")[0]} & HEAVY
        elif name not in seen:
            seen.add(name)
            parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
            waiting += [*EARLY[name], *(parent for parent in parents if parent in MODULES)]
    return heavy


@pytest.mark.parametrize("module", ["planning.scan_monitor", "planning.trial_book"])
def test_actors_that_only_keep_notes_import_nothing_heavy(module) -> None:
    """An actor imports the module of its class, in a process of its own at every start."""
    assert heavy_packages(f"ke_ray.{module}") == set()


def test_nothing_is_imported_late_that_costs_nothing() -> None:
    """A local import hides what a module depends on: it has to keep something heavy away."""
    offenders = []
    for module, path in MODULES.items():
        own = heavy_packages(module)
        for name in imports_by_time(path)[1]:
            if not heavy_packages(name) - own:
                offenders.append(f"{module} imports {name} in a function")
    assert offenders == []
