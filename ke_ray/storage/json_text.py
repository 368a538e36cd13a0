"""JSON that somebody else wrote, parsed within limits."""

from __future__ import annotations

import json
from typing import Any

# 64 MiB of "[],[],…" would take 2.3 GB as Python's objects; of this many, 0.5 GB.
MAX_JSON_ITEMS = 4_000_000


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON (or not UTF-8), nested too deeply, or of more than
            ``MAX_JSON_ITEMS`` commas and brackets.
    """
    if len(text) > MAX_JSON_ITEMS:
        is_bytes = isinstance(text, bytes)
        count: int = sum(text.count(m.encode() if is_bytes else m) for m in ",[{")  # type: ignore
        if count > MAX_JSON_ITEMS:
            raise ValueError(f"more than {MAX_JSON_ITEMS:,} commas and brackets")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
