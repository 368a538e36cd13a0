"""Secrets do not get into messages, log lines and names; a login in a URL is used as one."""

from __future__ import annotations

import base64
import http.server
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.transfer import download, public_url
from ke_ray.cli import main
from ke_ray.errors import CheckpointError, ConfigError, KeRayError
from ke_ray.secrets import RedactingFormatter, redact


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("see https://me:pw@host/x and", "see https://<redacted>@host/x and"),
        ("https://me:p@w@host/x", "https://<redacted>@host/x"),
        ("s3://key:pw@bucket/x", "s3://<redacted>@bucket/x"),
        ("https://host/a@b https://host/?a=b@c", "https://host/a@b https://host/?a=b@c"),
        ("hf://gpt2@main hf://org/repo@main", "hf://gpt2@main hf://org/repo@main"),
        ("token hf_abcdefgh12 end", "token <redacted> end"),
        ("https://h/?X-Amz-Signature=abc&b=1", "https://h/?X-Amz-<redacted>&b=1"),
        ("a Bearer abcdef0123456789, a bearer of news", "a <redacted> a bearer of news"),
        ("Authorization: Basic dXNlcjpwYXNz", "<redacted>"),
        ("AKIAABCDEFGHIJKLMNOP ghp_abcdefgh12345678", "<redacted> <redacted>"),
        ("eos_token_id=3, tokenizer=x.json", "eos_token_id=3, tokenizer=x.json"),
    ],
)
def test_what_is_taken_out_and_what_is_not(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_nested_values_and_malformed_addresses() -> None:
    given = {"a": ["https://u:pw@h/x", 3, None], "b": {"c": ("hf_abcdefgh12",)}}
    assert "pw" not in str(redact(given))
    assert redact(given)["a"][1:] == [3, None]
    assert "pw" not in public_url("http://u:pw@[")


def test_messages_hold_neither_passwords_nor_control_characters() -> None:
    error = ConfigError("no 'https://u:pw@host/x' \x1b]0;title\x07 and\nmore")
    assert str(error) == "no 'https://<redacted>@host/x' \\x1b]0;title\\x07 and\nmore"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (ours)
    assert (type(again), str(again)) == (ConfigError, str(error))
    assert str(KeRayError()) == ""


def test_log_lines_and_their_tracebacks_are_redacted() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "at %s", ("http://u:pw@h",), None)
    try:
        raise ValueError("from http://u:pw@h/x")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = RedactingFormatter("%(message)s").format(record)
    assert "ValueError" in text
    assert "u:pw" not in text


class Door(http.server.BaseHTTPRequestHandler):
    """Answers who logs in; ``/away`` leads to another host."""

    seen: list[tuple[str, str | None]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.seen.append((self.path, given))
        if self.path.startswith("/away"):
            self.send_response(302)
            port = self.server.server_address[1]
            self.send_header("Location", f"http://localhost:{port}/elsewhere")
            self.end_headers()
            return
        code = 200 if given or self.path == "/elsewhere" else 401
        self.send_response(code)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")


@pytest.fixture
def door() -> Iterator[http.server.HTTPServer]:
    Door.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_login_in_a_url_is_sent_and_not_carried_on(door, tmp_path: Path) -> None:
    base = f"http://us%40er:p%3Aw@127.0.0.1:{door.server_port}"
    assert download(f"{base}/file", tmp_path / "file")
    login = "Basic " + base64.b64encode(b"us@er:p:w").decode()
    assert Door.seen == [("/file", login)]
    Door.seen.clear()
    assert download(f"{base}/away", tmp_path / "other")
    assert Door.seen == [("/away", login), ("/elsewhere", None)]
    Door.seen.clear()
    assert download(base.replace("127.0.0.1", "localhost") + "/away", tmp_path / "same host")
    assert Door.seen == [("/away", login), ("/elsewhere", login)]
    with pytest.raises(CheckpointError) as caught:
        download(f"http://127.0.0.1:{door.server_port}/file?token=abcdef", tmp_path / "third")
    assert "abcdef" not in str(caught.value)


def test_names_of_checkpoints_hold_no_login(tmp_path: Path, door) -> None:
    (tmp_path / "list.csv").write_text("step,url\n1,http://user:pw@h\n2,http://user:pw@h/step2\n")
    refs = list_checkpoints(str(tmp_path / "list.csv"))
    assert [ref.name for ref in refs] == ["h", "step2"]
    assert "pw" not in CheckpointRef("x", "http://user:pw@h/step2", "native").label


def test_an_error_at_the_command_line_is_redacted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = "http://user:planted-pw@127.0.0.1:9/step1"
    monkeypatch.setattr("sys.argv", ["ke-ray", "-v", "checkpoints", spec])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert "127.0.0.1:9" in output.err
    assert "planted-pw" not in output.out + output.err


def test_a_traceback_shows_neither_passwords_nor_control_characters() -> None:
    code = (
        "import sys, threading, ke_ray.cli\n"
        "def fail(): raise ValueError('at http://u:planted-pw@h/x \\x1b]0;title\\x07')\n"
        "@ke_ray.cli.app.command()\n"
        "def broken():\n"
        "    thread = threading.Thread(target=fail)\n"
        "    thread.start(); thread.join(); fail()\n"
        "sys.argv[1:] = ['broken']\n"
        "ke_ray.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: at http://<redacted>@h/x \\x1b]0;title\\x07\n") == 2
    assert "planted-pw" not in done.stdout + done.stderr
