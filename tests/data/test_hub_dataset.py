"""Data sets of the Hub: what cannot work is said before anything is downloaded."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ke_ray.data.hub_dataset import check_hub_source, describe_hub_dataset, iter_hub_documents
from ke_ray.errors import DataError

FILES = {
    "org/scripted": ["README.md", "scripted.py", "urls/v1_7.txt"],
    "org/stored": ["README.md", "stored-00000.parquet", "other.py"],
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - one list for the test's server

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.partition("?")[0].removeprefix("/api/datasets/")
        known = name in FILES
        siblings = [{"rfilename": file} for file in FILES.get(name, [])]
        body = json.dumps({"id": name, "sha": "a" * 40, "siblings": siblings}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub that knows two data sets; yields the paths it was asked for."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Hub.asked = []
    yield Hub.asked
    server.shutdown()
    server.server_close()


def test_a_script_data_set_is_refused_from_its_listing(hub: list[str]) -> None:
    message = r"script \(scripted\.py\).*'urls/v1_7\.txt' lists them.*hf:allenai/c4:en"
    with pytest.raises(DataError, match=message):
        next(iter_hub_documents("hf:org/scripted"))
    assert [path for path in hub if "org/scripted" in path] == ["/api/datasets/org/scripted"]


@pytest.mark.parametrize("source", ["hf:allenai/dolma:v1_6-sample:train", "hf:allenai/dolma#text"])
def test_dolma_is_refused_before_any_request(hub: list[str], source: str) -> None:
    message = r"script \(dolma\.py\).*https://olmo-data\.org/\S+\.json\.gz"
    for read in (check_hub_source, describe_hub_dataset):
        with pytest.raises(DataError, match=message):
            read(source)
    assert hub == []


def test_a_data_set_stored_as_files_is_not(hub: list[str]) -> None:
    assert describe_hub_dataset("hf:org/stored")["version"] == "a" * 40


def test_a_local_script_data_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text("raise SystemExit")
    with pytest.raises(DataError, match=r"script \(mine\.py\)"):
        next(iter_hub_documents(f"hf:{folder}"))


def test_a_path_on_the_hub_is_told_the_form_of_a_data_set() -> None:
    with pytest.raises(DataError, match="is a path.*hf:allenai/c4:en:train"):
        describe_hub_dataset("hf://datasets/allenai/c4/en/*.json.gz")
