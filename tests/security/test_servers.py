"""Servers that ke_ray starts: where they listen, and what their command lines show."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from ke_ray.cli import view
from ke_ray.report import dashboard

DATABASE = "postgresql://planted-user:planted-password@db.example/mlflow"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would be started: command lines and the variables given with them."""
    found: list[tuple[list[str], dict[str, str]]] = []

    class Child:
        pid = 0

        def __init__(self, command: list[str], **keys: Any) -> None:
            found.append((command, keys["env"]))

        def poll(self) -> None:
            return None

    monkeypatch.setattr(dashboard.subprocess, "Popen", Child)
    monkeypatch.setattr(dashboard, "_await", lambda *_: None)
    return found


def test_pages_listen_on_loopback_unless_told(tmp_path: Path, started: list) -> None:
    lines: list[str] = []
    dashboard.start_dashboard([tmp_path], mlflow_uri="sqlite:///x.db", say=lines.append)
    (server, _), (page, _) = started
    assert server[server.index("--host") + 1] == "127.0.0.1"
    assert "--server.address=127.0.0.1" in page
    assert not any("0.0.0.0" in word for word in (*server, *page))
    assert not any("no password" in line for line in lines)
    assert inspect.signature(view.dashboard).parameters["host"].default == "127.0.0.1"


def test_another_interface_is_said(tmp_path: Path, started: list) -> None:
    lines: list[str] = []
    dashboard.start_dashboard([tmp_path], host="0.0.0.0", say=lines.append)
    assert any("no password" in line for line in lines)


@pytest.mark.parametrize("uri", [DATABASE, "http://planted-user:planted-password@127.0.0.1:5"])
def test_passwords_stand_on_no_command_line(tmp_path: Path, started: list, uri: str) -> None:
    lines: list[str] = []
    dashboard.start_dashboard([tmp_path], mlflow_uri=uri, say=lines.append)
    assert "planted-password" not in json.dumps([command for command, _ in started])
    assert "planted-password" not in "\n".join(lines)
    if uri == DATABASE:
        assert started[0][1]["MLFLOW_BACKEND_STORE_URI"] == DATABASE


def test_clusters_of_the_manifests_ask_for_the_token() -> None:
    """Ray listens on all interfaces; every way in ``jobs/`` keeps the token on."""
    for path in sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml")):
        text = path.read_text()
        if "ray start" in text:
            assert text.count("RAY_AUTH_MODE=token") >= text.count("ray start --"), path.name
        if "kind: RayJob" in text:
            assert "mode: token" in text, path.name
