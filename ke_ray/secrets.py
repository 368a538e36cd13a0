"""Text that goes out: without passwords in URLs, access tokens, and what steers a terminal."""

from __future__ import annotations

import logging
import re
from typing import Any, overload

# To the last "@" before the path: a password may hold one itself. In hf://name@revision it is none.
_CREDENTIALS = re.compile(r"(?<=://)(?<!hf://)[^/\s?#]*@")
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{8,}|gh[opsru]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[0-9A-Z]{16}"
    r"|(?i:bearer)\s+(?=[^\s'\"]*\d)[^\s'\"]{8,}|(?i:authorization)\s*[:=]\s*(?:\w+\s+)?[^\s'\"]{6,}"
    r"|(?i:token|password|passwd|secret|signature|sig|credential|api_?key|access_?key(?:_?id)?"
    r"|AWSAccessKeyId)=[^\s&'\"]+)"
)
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
_SECRET_WORDS = frozenset(
    {"TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "SECRET", "CREDENTIAL", "CREDENTIALS", "APIKEY"}
)
_SECRET_PARTS = ("PASSWORD", "SECRET", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "AUTH_KEY")


@overload
def redact(value: str) -> str: ...
@overload
def redact(value: Any) -> Any: ...
def redact(value: Any) -> Any:
    """Remove user names and passwords in URLs, and access tokens, from plain values.

    Args:
        value: a text, or dicts and lists of them to any depth; other values stay as they are.

    Returns:
        the same with every text redacted; tuples become lists.
    """
    if isinstance(value, str):
        return _TOKENS.sub("<redacted>", _CREDENTIALS.sub("<redacted>@", value))
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def printable(text: str) -> str:
    """Text from outside, fit for a terminal, a log or a file.

    Secrets are removed as in ``redact``. Control characters, by which a name could set a terminal's
    title or its clipboard, are shown as escapes; line ends and tabs stay.
    """
    return redact(text).translate(_CONTROLS)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret (``HF_TOKEN``, ``MLFLOW_TRACKING_PASSWORD``).

    ``TOKENIZERS_PARALLELISM`` does not, ``RAY_AUTH_TOKEN_PATH`` names a file, and ``eos_token_id``
    is a number.
    """
    upper = name.upper().replace("-", "_")
    if upper.endswith(("_PATH", "_FILE")):
        return False
    if any(part in upper for part in _SECRET_PARTS):
        return True
    words = upper.split("_")
    return words[-1] not in ("ID", "IDS") and not _SECRET_WORDS.isdisjoint(words)


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line or traceback, fit to be printed."""
        return printable(super().format(record))
