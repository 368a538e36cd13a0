"""Nodes must have this command's ke_ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

import ke_ray
from ke_ray.engine.cluster import shared_code
from ke_ray.engine.cluster.shared_code import _question, check_nodes_run_this_code
from ke_ray.errors import UserError

Found = tuple[str, str]


def answers(monkeypatch: pytest.MonkeyPatch, **found: Callable[[Found], Found]) -> None:
    """Nodes whose answers are made from the true one."""

    def ask(question: Callable[[], Found]) -> list[tuple[str, Found]]:
        return [(node, change(question())) for node, change in found.items()]

    monkeypatch.setattr(shared_code, "ask_other_nodes", ask)


def test_the_same_code_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    check_nodes_run_this_code()
    answers(monkeypatch, one=lambda here: here, two=lambda here: here)
    check_nodes_run_this_code()


def test_nodes_with_other_code_are_named_by_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch,
        same=lambda here: here,
        old=lambda here: ("0.0.9", "0a1b2c3d"),
        older=lambda here: ("0.0.9", "0a1b2c3d"),
        edited=lambda here: (here[0], "4e5f6a7b"),
        bare=lambda here: ("", ""),
    )
    with pytest.raises(UserError) as refused:
        check_nodes_run_this_code()
    message = str(refused.value)
    assert f"This command is ke_ray {ke_ray.__version__} (files {_question()()[1]})" in message
    assert "the nodes old, older: ke_ray 0.0.9;" in message
    assert f"the node edited: ke_ray {ke_ray.__version__} (files 4e5f6a7b);" in message
    assert "the node bare: no ke_ray at all" in message
    assert "same" not in message.split("differ: ")[1].split(". Install")[0]


def test_a_node_without_ke_ray_can_answer() -> None:
    sent = cloudpickle.dumps(_question()).hex()  # as Ray sends it
    node = "import sys, cloudpickle; sys.modules['ke_ray'] = None;"
    node += "print(cloudpickle.loads(bytes.fromhex(sys.argv[1]))())"
    done = subprocess.run(
        [sys.executable, "-c", node, sent], capture_output=True, text=True, check=False
    )
    assert done.stdout == "('', '')\n", done.stderr


def test_every_change_of_the_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ke_ray"
    (package / "sub").mkdir(parents=True)
    seen = set()
    for name, content in (("__init__.py", ""), ("sub/a.py", ""), ("sub/a.py", "1"), ("b.py", "1")):
        (package / name).write_text(content)
        spec = type("Spec", (), {"origin": str(package / "__init__.py")})
        monkeypatch.setattr("importlib.util.find_spec", lambda _, spec=spec: spec)
        seen.add(_question()()[1])
    assert len(seen) == 4
