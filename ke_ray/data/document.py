"""One document: parsing of its JSON line, and checks of its text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ke_ray.errors import DataError
from ke_ray.storage import parse_json


def parse_document(line: bytes, origin: str, column: str = "text") -> str:
    """The text of one JSON line.

    Raises:
        DataError: not UTF-8, not a JSON object, no such field, not a text, empty, or holding
            lone surrogates (which no tokenizer can encode).
    """
    try:
        document = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: byte {error.start} is not UTF-8 text.") from error
    except ValueError as error:
        raise DataError(
            f"{origin}: not valid JSON ({error}); expected one document per line, "
            f'like {{"id": "…", "text": "…"}}.'
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            f"{origin}: holds a JSON {type(document).__name__}, expected an object with '{column}'."
        )
    if column not in document:
        raise DataError(
            f"{origin}: the document has no field '{column}' (it has: {field_names(document)})."
        )
    return check_text(document[column], origin, column)


def check_text(text: Any, origin: str, column: str = "text") -> str:
    """``text`` itself when it is a document.

    Raises:
        DataError: not a string, empty, or not encodable.
    """
    if not isinstance(text, str):
        raise DataError(f"{origin}: '{column}' is {type(text).__name__}, expected a text.")
    if not text or text.isspace():
        raise DataError(f"{origin}: the document is empty; remove it from the corpus.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{origin}: character {error.start} is half a surrogate pair, not text."
            ) from error
    return text


def field_names(mapping: Iterable[object]) -> str:
    names = [str(name)[:40] for name in mapping]
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "none"
