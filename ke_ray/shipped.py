"""Files that ship with ke_ray: studies, jobs and dashboards.

They stand in ``sweeps/``, ``jobs/`` and ``dashboards/`` of a checkout; a wheel carries the same
folders inside the package (``pyproject.toml``, ``force-include``).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from ke_ray.config import read_yaml
from ke_ray.errors import ConfigError, nearest

#: By the comment that begins so, editors find the schema of a study.
MODELINE = "yaml-language-server: $schema="
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class ShippedFile:
    """A study or a job: its name, its ``kind``, and the sentence that its file begins with."""

    name: str
    path: Path
    kind: str
    title: str


def shipped_folder(name: str) -> Path:
    """``sweeps``, ``jobs`` or ``dashboards``: of the package, or of the checkout around it."""
    inside = _PACKAGE / "shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def list_shipped(folder: str = "sweeps") -> list[ShippedFile]:
    """The studies (or, from ``jobs``, the jobs) that ship with ke_ray, by name."""
    files = []
    for path in sorted(shipped_folder(folder).rglob("*.yaml")):
        name = path.relative_to(shipped_folder(folder)).with_suffix("").as_posix()
        files.append(ShippedFile(name, path, read_yaml(str(path), folder)["kind"], _title(path)))
    return files


def tested_versions() -> dict[str, str]:
    """Package → the version that ke_ray was tested with (``constraints.txt``)."""
    inside = _PACKAGE / "shipped" / "constraints.txt"
    path = inside if inside.is_file() else _PACKAGE.parent / "constraints.txt"
    pins = (line.partition("==") for line in path.read_text().splitlines() if "==" in line)
    return {name.strip().lower(): version.strip() for name, _, version in pins}


def find_study(text: str) -> str | None:
    """The path of a study that a command line names by its file or by its shipped name.

    Returns:
        None where ``text`` is neither; a path that ends in ``.yaml`` or ``.yml`` is always a file.
    """
    if text.endswith((".yaml", ".yml")) and not Path(text).is_dir():
        return text
    path = shipped_folder("sweeps") / f"{text}.yaml"
    is_name = not text.startswith(("/", ".", "~")) and ".." not in Path(text).parts
    return str(path) if is_name and not Path(text).exists() and path.is_file() else None


def study_path(text: str) -> str:
    """As ``find_study``, where nothing but a study will do.

    Raises:
        ConfigError: no file and no shipped study has this name.
    """
    path = find_study(text)
    if path is None and ("://" in text or Path(text).is_file()):
        return text
    if path is None:
        names = [study.name for study in list_shipped()]
        raise ConfigError(
            f"There is no study '{text:.200}'; give a YAML file, or the name of a shipped study "
            f"('ke-ray studies' lists them).{nearest(text, names)}"
        )
    return path


def _title(path: Path) -> str:
    """The first sentence of the comment at the beginning of a file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    comments = (line.removeprefix("#").strip() for line in lines)
    text = " ".join(line for line in comments if not line.startswith(MODELINE))
    return re.split(r"(?<!Fig)\. |: ke-ray |:  |\.$", text, maxsplit=1)[0]
