"""What has to agree before a release, and which pins are old: a part of ``make release-check``.

``python tests/release/check_release.py`` prints a line for each finding and ends with 1 where the
version, the changelog, the citation and the image's name do not agree. Old pins are told and fail
nothing; without a package index their age is not known, and that is told instead.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAX_AGE_DAYS = 90
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def version_of(root: Path) -> str:
    """The version, which ``ke_ray/__init__.py`` alone says."""
    text = (root / "ke_ray" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found is not None, "ke_ray/__init__.py has no __version__"
    return found[1]


def problems(root: Path) -> Iterator[str]:
    """Disagreements about the version, each with what to do."""
    version = version_of(root)
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    section = sections[0] if sections else ""
    if section.split(maxsplit=1)[:1] != [version]:
        yield f"CHANGELOG.md does not begin with a section for {version}; write '## {version} (…)'"
    elif not re.search(r"^- ", section, re.MULTILINE):
        yield f"CHANGELOG.md says nothing of {version}; list its changes"
    elif not re.match(r"\S+ \(\d{4}-\d\d-\d\d\)$", section.splitlines()[0]):
        yield f"CHANGELOG.md has no date for {version}; write '## {version} (YYYY-MM-DD)'"
    cited = str(yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"])
    if cited != version:
        yield f"CITATION.cff has version {cited}, ke_ray/__init__.py {version}; write {version}"
    for name in ("Dockerfile", "kuberay-cpu.yaml", "kuberay-gpu.yaml"):
        tags = re.findall(r"/ke-ray:(\S+)", (root / "jobs" / name).read_text(encoding="utf-8"))
        for tag in sorted({*tags} - {version}):
            yield f"jobs/{name} names the image ke-ray:{tag}; write ke-ray:{version}"


def read_pins(root: Path) -> dict[str, str]:
    """Package → version of ``constraints.txt``."""
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    pins = (line.partition("==") for line in text.splitlines() if "==" in line)
    return {_normal(name): version.strip() for name, _, version in pins}


def old_pins(pins: Mapping[str, str], site: Path | None = None) -> list[str] | None:
    """Pins of which a newer release has been out for ``MAX_AGE_DAYS``, as pip's index says.

    Args:
        site: the folder of the packages that pip looks at; default: those of this environment.

    Returns:
        None where no package index answers.
    """
    probe = [*_PIP, "index", "versions", "pip", "--retries", "0", "--timeout", "5"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return None
    command = [*_PIP, "list", "--outdated", "--format", "json"]
    command += ["--uploaded-prior-to", f"P{MAX_AGE_DAYS}D"]
    command += ["--path", str(site)] if site else []
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    return [
        f"{row['name']}=={row['version']}; {row['latest_version']} has been out for more than "
        f"{MAX_AGE_DAYS} days"
        for row in json.loads(answer.stdout)
        if pins.get(_normal(row["name"])) == row["version"]
    ]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main() -> int:
    """Print the findings; return the exit code."""
    found = list(problems(ROOT))
    for text in found:
        print(f"problem  {text}")
    old = old_pins(read_pins(ROOT))
    if old is None:
        print("note     no package index answers: the age of the pins is not known")
    for text in old or ():
        print(f"note     {text}")
    print(f"{version_of(ROOT)}: " + ("not ready." if found else "ready."))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
