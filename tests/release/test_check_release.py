"""``make release-check``: what it finds, with a package index of our own, and without one."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from check_release import ROOT, old_pins, problems, read_pins, version_of
from servers import free_port

#: Package → {version: days since it was uploaded}.
RELEASES = {
    "pip": {"1.0": 500},
    "long-left": {"1.0": 200, "2.0": 100},
    "just-left": {"1.0": 200, "2.0": 10},
    "last": {"1.0": 900},
    "not.pinned": {"1.0": 200, "2.0": 100},
}


class Index(http.server.BaseHTTPRequestHandler):
    """The JSON pages of a package index (PEP 691), with upload times (PEP 700)."""

    def do_GET(self) -> None:
        name = self.path.strip("/").removeprefix("simple/")
        releases = RELEASES.get(name.replace("not-pinned", "not.pinned"))
        files = []
        for version, days in (releases or {}).items():
            wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
            uploaded = datetime.now(UTC) - timedelta(days=days)
            facts = {"hashes": {}, "size": 1, "upload-time": f"{uploaded:%Y-%m-%dT%H:%M:%SZ}"}
            files.append({"filename": wheel, "url": f"/{wheel}", **facts})
        page = {"meta": {"api-version": "1.1"}, "name": name, "files": files, "versions": []}
        self.send_response(200 if releases else 404)
        self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        self.end_headers()
        self.wfile.write(json.dumps(page).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which pip takes for the only one there is."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple/"
    _only(monkeypatch, url)
    yield url
    server.shutdown()
    server.server_close()


def _only(patch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_NO_INDEX"):
        patch.delenv(name, raising=False)
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")
    patch.setenv("PIP_INDEX_URL", url)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder in which version 1.0 of every package is installed."""
    for name in RELEASES:
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return tmp_path


def test_a_pin_is_old_when_a_newer_release_has_been_out_for_90_days(index: str, site: Path) -> None:
    pins = {"long-left": "1.0", "just-left": "1.0", "last": "1.0"}
    assert old_pins(pins, site) == ["long-left==1.0; 2.0 has been out for more than 90 days"]
    assert old_pins(pins | {"long-left": "2.0"}, site) == [], "what is installed is not the pin"


def test_without_an_index_the_age_is_not_known_and_nothing_fails(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, f"http://127.0.0.1:{free_port()}/simple/")
    assert old_pins({"long-left": "1.0"}, site) is None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that name the version, as for a release."""
    (tmp_path / "ke_ray").mkdir()
    for name in ("ke_ray/__init__.py", "CITATION.cff", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    version = version_of(ROOT)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {version} (2026-12-01)\n\n- All.\n")
    return tmp_path


def test_a_release_on_which_all_agree_has_no_problem(checkout: Path) -> None:
    assert list(problems(checkout)) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "told"),
    [
        ("ke_ray/__init__.py", '"0.1.0"', '"0.2.0"', "section for 0.2.0"),
        ("CHANGELOG.md", "- All.", "", "says nothing of 0.1.0"),
        ("CHANGELOG.md", "2026-12-01", "unreleased", "has no date for 0.1.0"),
        ("CITATION.cff", "version: 0.1.0", "version: 0.0.9", "CITATION.cff has version 0.0.9"),
        ("jobs/kuberay-gpu.yaml", "ke-ray:0.1.0", "ke-ray:latest", "names the image ke-ray:latest"),
    ],
)
def test_what_disagrees_is_told_with_the_remedy(
    checkout: Path, file: str, before: str, after: str, told: str
) -> None:
    text = (checkout / file).read_text()
    assert before in text
    (checkout / file).write_text(text.replace(before, after))
    found = list(problems(checkout))
    assert any(told in problem and "; " in problem for problem in found), found


def test_public_ci_does_what_ci_run_does_on_a_bare_machine() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["container"]["image"] == "python:${{ matrix.python }}-bookworm", "as root, with apt"
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = metadata["requires-python"].removeprefix(">=")
    assert least in job["strategy"]["matrix"]["python"]


def test_pins_are_read_by_their_normal_names() -> None:
    pins = read_pins(ROOT)
    assert pins["ray"]
    assert all(name == name.lower() and "_" not in name for name in pins)
