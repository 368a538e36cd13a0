"""ke_ray from its wheel, without the repository around it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import urllib.request
import venv
from pathlib import Path

import pytest

from ke_ray.shipped import list_shipped

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


class Installed:
    """An environment with the wheel, beside the packages of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder / "dist")]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = (folder / "dist").glob("*.whl")
        (self.sdist,) = (folder / "dist").glob("*.tar.gz")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps"]
        subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True)
        # What ke_ray needs is here already. A .pth file of a folder that a .pth file names is not
        # read, so the checkout that is installed here in place cannot be imported there.
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (packages / "others.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")

    def run(self, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """``ke-ray`` in a folder."""
        return subprocess.run(
            [str(self.folder / "bin" / "ke-ray"), *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )

    def runs(self, folder: Path, *arguments: object) -> str:
        """What a command prints that has to end well."""
        done = self.run(folder, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_wheel_is_what_is_imported(installed: Installed, tmp_path: Path) -> None:
    where = [installed.python, "-c", "import ke_ray; print(ke_ray.__file__)"]
    path = subprocess.check_output(where, cwd=tmp_path, text=True).strip()
    assert Path(path).is_relative_to(installed.folder)


def test_shipped_studies_are_listed_and_copied(installed: Installed, tmp_path: Path) -> None:
    listed = [line.split()[:2] for line in installed.runs(tmp_path, "studies").splitlines()]
    for study in list_shipped():
        assert [study.name, study.kind] in listed
    installed.runs(tmp_path, "init", "olmo_1b")
    copy, original = tmp_path / "olmo_1b.yaml", ROOT / "sweeps" / "olmo_1b.yaml"
    assert copy.read_text().splitlines()[1:] == original.read_text().splitlines()[1:]
    again = installed.run(tmp_path, "init", "olmo_1b")
    assert again.returncode == 2
    assert "'olmo_1b.yaml' exists already" in again.stderr
    unknown = installed.run(tmp_path, "init", "olmo_1", "--output", "x.yaml")
    assert unknown.returncode == 2
    assert "Did you mean 'olmo_1b'?" in unknown.stderr
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.ray
def test_studies_run_by_name_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    small = ["--set", "num_steps=12", "--set", "checkpoints.steps=[6,12]", "--no-mlflow"]
    installed.runs(tmp_path, "pretrain", "demo_pretrain", *small, "--output", "series")
    data = "data.biographies=series/world/documents.jsonl.gz"
    few = ["--set", data, "--set", "num_instances=16", "--set", "sequence_length=64"]
    spec = ["--set", "checkpoints.spec=series/checkpoints", "--no-mlflow", "--output", "scan"]
    assert "2 scanned, 0 failed" in installed.runs(tmp_path, "scan", "demo_scan", *few, *spec)
    installed.runs(tmp_path, "report", "scan")
    assert "<html" in (tmp_path / "report.html").read_text()[:1000]
    command = [str(installed.folder / "bin" / "ke-ray"), "dashboard", "scan"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            address = next(word for line in page.stdout for word in line.split() if "://" in word)
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert answer.status == 200
        finally:
            page.terminate()


def test_the_source_distribution_holds_what_a_checkout_does(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    folders = ("ke_ray/", "sweeps/", "jobs/", "dashboards/", "tests/", "docs/")
    assert {name for name in tracked if name.startswith(folders)} <= names
