"""A check that the nodes of a joined cluster run the code of this command.

Workers import ke_ray from where their node has it. Another version there would fail in the middle,
or compute something else without a word.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from ke_ray.engine.cluster.shared_storage import ask_other_nodes, names_of_nodes
from ke_ray.errors import UserError


def check_nodes_run_this_code() -> None:
    """Ask every other node that can run work for its ke_ray; needs a Ray session.

    Raises:
        UserError: a node has none, another version, or other files of the same version.
        StorageError: a node does not answer.
    """
    ask = _question()
    version, files = ask()
    others: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, answer in ask_other_nodes(ask):
        if answer != (version, files):
            others[answer].append(node)
    if not others:
        return
    described = "; ".join(
        f"{names_of_nodes(nodes)}: {_described(found, version)}" for found, nodes in others.items()
    )
    raise UserError(
        f"This command is ke_ray {version} (files {files}), and other nodes differ: {described}. "
        "Install the same one on all nodes, or submit the command as a job with its working "
        "folder, which takes the code along (ke-ray submit)."
    )


def _described(found: tuple[str, str], version: str) -> str:
    if not found[0]:
        return "no ke_ray at all"
    return f"ke_ray {found[0]}" + (f" (files {found[1]})" if found[0] == version else "")


def _question() -> Callable[[], tuple[str, str]]:
    """A function that Ray sends as it is: a node need not have this module, or any of ours."""

    def ask() -> tuple[str, str]:
        spec = importlib.util.find_spec("ke_ray")
        if spec is None or spec.origin is None:
            return "", ""
        folder = Path(spec.origin).parent
        digest = hashlib.sha256()
        # A wheel carries the dashboards in shipped/, a checkout beside the package.
        paths = [p for p in folder.rglob("*.py") if p.relative_to(folder).parts[0] != "shipped"]
        for path in sorted(paths):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)} ".encode())
            digest.update(content)
        return importlib.import_module("ke_ray").__version__, digest.hexdigest()[:8]

    return ask
