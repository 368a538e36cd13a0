"""Lists of checkpoints: CSV files with a step and a folder, URL or Hub repository in each row.

The published lists have the header ``Step,Checkpoint Directory`` (OLMo-2's second stage has
``Ingredient`` too); any header with a location column is understood, and so is a file without
header whose rows are ``step,location``. Columns ``step``, ``tokens``, ``stage``, ``seed`` and
``branch`` take precedence over what names say. Relative paths start at the CSV's own folder. A
Hub repository is ``hf://org/name[@revision][:subfolder]``; a column named ``repository`` needs no
``hf://``.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from ke_ray.errors import CheckpointSpecError
from ke_ray.storage import exists, is_local, local_path, open_read

_LIMIT = 64 * 2**20  # bytes
_MAX_ROWS = 50_000
_LOCATIONS = (
    "url",
    "checkpoint directory",
    "checkpoint",
    "location",
    "path",
    "folder",
    "directory",
    "repository",
)
_STEP, _INGREDIENT = "step", "ingredient"
_COLUMNS = (_STEP, "tokens", "stage", "seed", "branch", _INGREDIENT)


@dataclass(frozen=True)
class Row:
    """One checkpoint of a list; None where a column is absent or empty."""

    location: str
    step: int | None = None
    tokens: int | None = None
    stage: str | None = None
    seed: str | None = None
    branch: str | None = None


def read_csv_list(spec: str) -> list[Row]:
    """Every row of a CSV file, in file order.

    Raises:
        CheckpointSpecError: absent, empty or malformed; the message names the line.
    """
    if not exists(spec) or (is_local(spec) and not local_path(spec).is_file()):
        raise CheckpointSpecError(f"There is no file '{spec}'.")
    with open_read(spec) as file:
        data = file.read(_LIMIT + 1)
    base = str(local_path(spec).parent) if is_local(spec) else spec.rsplit("/", 1)[0]
    return parse_csv_list(data, base=base, origin=spec)


def parse_csv_list(data: bytes, *, base: str, origin: str) -> list[Row]:
    """Parse the bytes of a list; ``base`` is where relative paths start."""
    if len(data) > _LIMIT:
        raise CheckpointSpecError(f"'{origin}' has more than {_LIMIT:,} bytes; is it a list?")
    try:
        text = data.decode("utf-8-sig")
        rows = [
            (number, [cell.strip() for cell in row])
            for number, row in enumerate(csv.reader(io.StringIO(text), strict=True), start=1)
            if any(cell.strip() for cell in row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointSpecError(f"'{origin}' is not a CSV text file: {error}.") from error
    if len(rows) > _MAX_ROWS:
        raise CheckpointSpecError(
            f"'{origin}' has {len(rows):,} rows; a list has at most {_MAX_ROWS:,} checkpoints."
        )
    if not rows:
        raise CheckpointSpecError(f"'{origin}' is empty; expected rows of step and folder or URL.")
    columns = _columns(rows[0][1])
    if columns is None:
        columns = {_STEP: 0, "location": 1}
        if len(rows[0][1]) < 2 or not _is_step(rows[0][1][0]):
            raise CheckpointSpecError(
                f"'{origin}', line {rows[0][0]}: expected a header such as 'step,url' or a row "
                f"of step and location, got {','.join(rows[0][1])[:80]!r}."
            )
    else:
        rows = rows[1:]
    if not rows:
        raise CheckpointSpecError(f"'{origin}' has a header and no rows.")
    return [_row(row, columns, base, f"'{origin}', line {number}") for number, row in rows]


def _columns(header: list[str]) -> dict[str, int] | None:
    names = [name.lower() for name in header]
    location = next((name for name in _LOCATIONS if name in names), None)
    if location is None:
        return None
    columns = {"location": names.index(location)}
    if location == "repository":
        columns["repository"] = names.index(location)
    columns.update({name: names.index(name) for name in _COLUMNS if name in names})
    return columns


def _row(row: list[str], columns: dict[str, int], base: str, origin: str) -> Row:
    def cell(name: str) -> str:
        index = columns.get(name)
        return row[index] if index is not None and index < len(row) else ""

    def integer(name: str) -> int | None:
        text = cell(name)
        if not text:
            return None
        if not _is_step(text):
            raise CheckpointSpecError(f"{origin}: {name} {text[:40]!r} is not a whole number.")
        return int(text)

    location = cell("location")
    if not location or "\0" in location:
        raise CheckpointSpecError(f"{origin}: no folder or URL; got {','.join(row)[:80]!r}.")
    if "repository" in columns and "://" not in location:
        location = f"hf://{location}"
    if "://" not in location and not Path(location).is_absolute():
        location = f"{base}/{location}" if not is_local(base) else str(Path(base) / location)
    ingredient = integer(_INGREDIENT)
    branch = cell("branch") or (None if ingredient is None else f"ingredient{ingredient}")
    stage, seed = cell("stage") or None, cell("seed") or None
    return Row(location, integer(_STEP), integer("tokens"), stage, seed, branch)


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 15
