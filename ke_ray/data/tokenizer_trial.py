"""A trial of others' tokenizers in a process of its own, before they meet the documents.

A ``tokenizer.json`` is a program: rules that replace text by longer text, one after the other, take
all memory, and regular expressions take all time. The library that runs them then aborts the whole
process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import prod
from typing import Any

from ke_ray.errors import DataError

CPU_S, MEMORY_BYTES = 20, 2 * 2**30
_WALL_S = 120.0  # on a busy machine, with the import
MAX_GROWTH = 20
_RULES = re.compile(r'"(?:Replace|Regex|Precompiled)"')
_CODE = f"""
import json, resource, sys
sys.path[:] = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_S}, {CPU_S}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_str(sys.stdin.read())
tokenizer.no_truncation()
tokenizer.no_padding()
for unit in ("a", "A", "1", " ", "\\n", ".", "a ", "ab1 ", "é", "中", "_-", "don't "):
    tokenizer.encode(unit * 2_000, add_special_tokens=False)
"""


def try_tokenizer(text: str, name: str) -> None:
    """Refuse a ``tokenizer.json`` whose rules take too much time or memory.

    Files without such rules, which most byte-level ones are, are not tried.

    Raises:
        DataError: its rules lengthen a text more than ``MAX_GROWTH`` times, or 24,000 characters
            take more than ``CPU_S`` seconds or ``MEMORY_BYTES``, or make the library fail.
    """
    if not _RULES.search(_without_escapes(text)):
        return
    if (growth := _growth(text)) > MAX_GROWTH:
        raise DataError(
            f"The rules of the tokenizer '{name}' may make a text {growth:.3g} times as long; a "
            f"tokenizer's make it at most {MAX_GROWTH} times as long."
        )
    try:
        trial = subprocess.run(
            [sys.executable, "-I", "-c", _CODE, json.dumps(sys.path)],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_WALL_S,
            check=False,
            env={"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        problem = f"no end within {_WALL_S:.0f} s"
    else:
        if trial.returncode == 0:
            return
        lines = trial.stderr.strip().splitlines()
        problem = (lines[-1] if lines else f"exit code {trial.returncode}")[:200]
    raise DataError(
        f"The tokenizer '{name}' does not encode 2,000 characters of a kind in {CPU_S} s and "
        f"{MEMORY_BYTES >> 30} GiB ({problem}); give another one."
    )


def _without_escapes(text: str) -> str:
    """The same JSON with ``\\u0052`` and the like written out; as it is where it is not JSON."""
    if "\\u" not in text:
        return text
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return text  # the library says what is wrong


def _growth(text: str) -> float:
    """An upper bound of how many times as long its ``Replace`` rules make a text."""
    try:
        rules = _replacements(json.loads(text).get("normalizer"))
    except (ValueError, RecursionError, AttributeError):
        return 1.0  # the library says what is wrong
    return prod(max(1.0, float(len(rule))) for rule in rules)


def _replacements(normalizer: Any) -> list[str]:
    if isinstance(normalizer, list):
        return [rule for item in normalizer for rule in _replacements(item)]
    if not isinstance(normalizer, dict):
        return []
    content = normalizer.get("content") if normalizer.get("type") == "Replace" else None
    own = [content] if isinstance(content, str) else []
    return own + _replacements(normalizer.get("normalizers"))
