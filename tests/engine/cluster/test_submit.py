"""The parts of ``ke-ray submit`` that need no cluster."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from ke_ray.engine.cluster import job_server
from ke_ray.engine.cluster.job_server import _Log, _prepare_token, exit_code_of
from ke_ray.engine.cluster.submit import new_submission_id
from ke_ray.errors import UserError


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("SUCCEEDED", None, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 137, 137),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", 0, 130),
        ("STOPPED", -15, 130),
    ],
)
def test_the_exit_code_is_the_jobs_own(status, code, expected):
    assert exit_code_of(status, code) == expected


def test_submission_ids_do_not_repeat():
    ids = {new_submission_id("scan") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(one.startswith("scan-2") for one in ids)


def test_a_log_that_is_read_again_is_written_once():
    written: list[str] = []
    log = _Log(written.append)
    log.add("one\ntw")
    for parts in (["one\n", "two\nth"], ["one\ntwo\nthree\n"], [""], ["o"], ["one\ntwo\nthree\n4"]):
        log.rewind()
        for part in parts:
            log.add(part)
    assert "".join(written) == "one\ntwo\nthree\n4"


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_token_file_that_holds_none_is_named(tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        _prepare_token({"RAY_AUTH_TOKEN_PATH": str(path)})


def test_a_token_switches_its_use_on_and_an_explicit_choice_stays(tmp_path):
    (tmp_path / "token").write_text("abc")
    environ = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    _prepare_token(environ)
    assert environ["RAY_AUTH_MODE"] == "token"
    environ = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent"), "RAY_AUTH_MODE": "disabled"}
    _prepare_token(environ)
    assert environ["RAY_AUTH_MODE"] == "disabled"


def submit(folder, address, **keys) -> subprocess.CompletedProcess[str]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"kind": "job", "entrypoint": "true", **keys}))
    return subprocess.run(
        [sys.executable, "-m", "ke_ray", "submit", str(path), "--address", address],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
def test_no_server_at_the_address_is_one_line_and_exit_code_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = submit(tmp_path, f"http://127.0.0.1:{port}")
    assert result.returncode == 2
    assert f"No job server answers at http://127.0.0.1:{port}." in result.stderr
    assert "Traceback" not in result.stderr
    result = submit(tmp_path, f"127.0.0.1:{port}")
    assert result.returncode == 2
    assert "is not a job server's address" in result.stderr


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(monkeypatch, silent_port):
    assert job_server._ANSWER_TIMEOUT_S < 60
    monkeypatch.setattr(job_server, "_ANSWER_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match="No job server answers at .* give another --address"):
        job_server.JobServer(f"http://127.0.0.1:{silent_port}")
