"""What of a job's working folder stays behind: secrets, and what lies outside of the folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

#: Where programs keep secrets; patterns as in .gitignore, at any depth.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", ".pgpass", ".pypirc", ".npmrc", "auth_token"),
    *(".git/", ".git-credentials", ".ssh/", ".aws/", ".azure/", ".kube/", ".docker/", ".gnupg/"),
    *("**/.config/gcloud/", ".huggingface/", "**/.streamlit/secrets.toml"),
    *("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "id_ecdsa*"),
)


def what_stays(folder: str, excludes: Sequence[str]) -> list[str]:
    """Patterns of what must not be sent of a local folder, ``excludes`` first.

    Ray follows links. Those that lead out of the folder are left behind, and a warning names the
    first: what they lead to was not named in the job file.
    """
    root = Path(folder).resolve()
    skipped = {pattern.strip("/") for pattern in (*excludes, *SECRET_FILES)}
    links: list[str] = []
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in (*folders, *sorted(files)):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                links.append(path.relative_to(root).as_posix())
    if links:
        log.warning(
            "%d links lead out of the working folder '%s' and are not sent, the first '%s'; copy "
            "what the job needs into the folder.",
            *(len(links), folder, links[0]),
        )
    # The last pattern that matches decides, so that no "!pattern" of the file brings these back.
    return [*excludes, *SECRET_FILES, *(f"/{_escaped(link)}" for link in links)]


def _escaped(path: str) -> str:
    return "".join(f"\\{character}" if character in "\\*?[ !#" else character for character in path)
