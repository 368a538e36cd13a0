"""ke_ray from its wheel, without the repository around it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest
from installed import ROOT, Installed

from ke_ray.shipped import list_shipped

pytestmark = pytest.mark.slow


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


def test_studies_run_by_name_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    small = ["--set", "num_steps=12", "--set", "checkpoints.steps=[6,12]", "--no-mlflow"]
    installed.runs(tmp_path, "pretrain", "demo_pretrain", *small, "--output", "series")
    # test_demo.py runs scans from the wheel, and all else that needs Ray.
    data = ["--set", "data.biographies=series/world/documents.jsonl.gz"]
    spec = ["--set", "checkpoints.spec=series/checkpoints", "--no-mlflow", "--dry-run"]
    assert "checkpoints: 2 " in installed.runs(tmp_path, "scan", "demo_scan", *data, *spec)
    installed.runs(tmp_path, "report", "series")
    assert "<html" in (tmp_path / "report.html").read_text()[:1000]
    command = [str(installed.folder / "bin" / "ke-ray"), "dashboard", "series"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            address = next(word for line in page.stdout for word in line.split() if "://" in word)
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert answer.status == 200
        finally:
            page.terminate()


def test_the_source_distribution_holds_what_a_checkout_does_and_makes_the_same_wheel(
    installed: Installed, tmp_path: Path
) -> None:
    with tarfile.open(installed.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    folders = ("ke_ray/", "sweeps/", "jobs/", "dashboards/", "tests/", "docs/")
    assert [n for n in tracked if n.startswith(folders) and not (unpacked / n).exists()] == []
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=unpacked, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [{*zipfile.ZipFile(path).namelist()} for path in (wheel, installed.wheel)]
    assert names[0] == names[1]
