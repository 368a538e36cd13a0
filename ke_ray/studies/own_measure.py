"""The file of a measure of your own, as text; `studies.own_measures` runs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ke_ray.errors import UserError


@dataclass(frozen=True)
class OwnMeasure:
    """A declaration in a file.

    Attributes:
        reference: ``FILE.py:NAME``, as it was given.
        source: the text of the file.
    """

    reference: str
    source: str

    @property
    def sha256(self) -> str:
        """Of the text of the file."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def read_own_measure(reference: str) -> OwnMeasure:
    """The file of ``FILE.py:NAME``.

    Raises:
        UserError: another form, or a file that cannot be read.
    """
    path, _, name = reference.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(
            f"{reference!r} is no measure of a file; give FILE.py:NAME, such as spread.py:spread. "
            "Measures that ke_ray or an installed package has go by their name, in --measures."
        )
    try:
        return OwnMeasure(reference, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"measure {reference!r}: cannot read '{path}': {error}") from error
