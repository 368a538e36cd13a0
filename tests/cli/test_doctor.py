"""``ke-ray doctor`` on machines that lack one thing or another."""

from __future__ import annotations

import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers with a refusal."""

    def do_HEAD(self) -> None:
        self.send_error(403)


@pytest.fixture
def answering() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def doctor(**environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ke_ray", "doctor"],
        env=os.environ | {"COLUMNS": "300", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_it_says_what_answers_and_what_does_not(
    answering: str, closed: str, tmp_path: Path
) -> None:
    store = answering.replace("//", "//user:pw1secret@")
    code, text = doctor(
        HF_ENDPOINT=answering,
        RAY_ADDRESS=closed,
        MLFLOW_TRACKING_URI=store,
        KE_RAY_CACHE=str(tmp_path / "cache"),
    )
    lines = {line.split()[1]: line for line in text.splitlines() if len(line.split()) > 2}
    assert lines["Hub"].startswith("ok")
    assert lines["Ray"].startswith("note")
    assert f"{closed} cannot be reached" in lines["Ray"]
    assert "<redacted>@127.0.0.1" in lines["MLflow"]
    assert str(tmp_path / "cache") in lines["cache"]
    assert f"{len(os.sched_getaffinity(0))}" in lines["cores"]
    assert "pw1secret" not in text
    assert (code, text.splitlines()[-1]) == (0, "Ready.")


def test_each_remedy_is_of_what_is_missing_and_nothing_is_cut_off(
    closed: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ray:
        code, text = doctor(
            COLUMNS="60",
            HF_ENDPOINT=f"http://{closed}",
            HTTPS_PROXY=f"http://{closed}",
            MLFLOW_TRACKING_URI=f"http://{closed}",
            RAY_ADDRESS=f"127.0.0.1:{ray.getsockname()[1]}",
            HOME=str(tmp_path),
            RAY_AUTH_TOKEN="",
            RAY_AUTH_TOKEN_PATH="",
        )
    assert (code, "…" in text) == (0, False)
    assert max(map(len, text.splitlines())) <= 60
    findings = re.split(r"\n(?=ok |note |problem )", text)
    remedies = {f.split()[1]: " ".join(f.partition("→")[2].split()) for f in findings}
    assert "--no-mlflow does without" in remedies["MLflow"]
    assert "HF_ENDPOINT" in remedies["Hub"]
    assert "--data NAME=SOURCE" in remedies["data"]
    assert "RAY_AUTH_TOKEN_PATH" in remedies["Ray"]


def test_a_package_that_is_too_old_is_a_problem(answering: str, tmp_path: Path) -> None:
    metadata = tmp_path / "optuna-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: optuna\nVersion: 0.1\n")
    code, text = doctor(HF_ENDPOINT=answering, PYTHONPATH=str(tmp_path))
    assert "optuna 0.1 (needs >=4.5)" in text
    assert "pip install" in text
    assert (code, text.splitlines()[-1]) == (1, "1 problem.")
