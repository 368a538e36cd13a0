"""Facts to inject: paragraphs, their paraphrases, and the probes that ask for them.

The JSON schema is that of Fictional Knowledge (Chang et al. 2024, arXiv 2406.11813): a list of
entries, each with

=====================  ==============================================================
``train_context``      the paragraph; version 0
``paraphrases``        further versions 1, 2, …; may be absent or empty
``mem_input/_target``  probes that repeat the paragraph (level ``memorization``)
``gen_input/_target``  probes in other words (level ``semantic``)
``hard_gen_…``         probes that need several sentences (level ``compositional``)
=====================  ==============================================================

``*_input`` and ``*_target`` are lists of equal length: contexts and the spans that complete them.
Any number of paraphrases and probes is accepted; an entry needs at least one probe, since
acquisition averages over the probes of each paragraph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ke_ray import storage
from ke_ray.errors import DataError, nearest

__all__ = ["LEVELS", "SETTINGS", "Fact", "FactSet", "load_facts", "parse_facts"]

#: How a paragraph is injected: every injection in another version, or in one injection only.
SETTINGS = ("once", "paraphrase")

#: Probe level -> prefix of its two fields in the JSON.
LEVELS = {"memorization": "mem", "semantic": "gen", "compositional": "hard_gen"}

_FIELDS = (
    "train_context",
    "paraphrases",
    *(f"{prefix}_{part}" for prefix in LEVELS.values() for part in ("input", "target")),
)
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Fact:
    """One paragraph.

    Attributes:
        versions: the paragraph and its paraphrases, in order; never empty.
        probes: level -> pairs (context, target), possibly empty for a level but not for all.
    """

    versions: tuple[str, ...]
    probes: Mapping[str, tuple[tuple[str, str], ...]]

    @property
    def num_probes(self) -> int:
        """Probes of all levels."""
        return sum(len(pairs) for pairs in self.probes.values())


@dataclass(frozen=True)
class FactSet:
    """Facts that share a setting; a fact's instance number is its place in ``facts``."""

    setting: str
    facts: tuple[Fact, ...]
    source: str = ""

    @property
    def num_probes(self) -> int:
        """Probes of all facts."""
        return sum(fact.num_probes for fact in self.facts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} holds {type(value).__name__}, expected text.")
    if not value.strip():
        raise DataError(f"{where} is empty; give the text or remove the entry.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair (an escape like \\ud83d on its own), which is "
            "no character; write the character itself."
        ) from error
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where} holds {type(value).__name__}, expected a list of texts.")
    return tuple(_text(item, f"{where}[{index}]") for index, item in enumerate(value))


def _parse_entry(entry: Any, where: str) -> Fact:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} is {type(entry).__name__}, expected an object with its fields.")
    for key in entry:
        if key not in _FIELDS:
            hint = nearest(str(key), _FIELDS) or f" Valid fields: {', '.join(_FIELDS)}."
            raise DataError(f"{where} has an unknown field '{str(key)[:60]}'.{hint}")
    if "train_context" not in entry:
        raise DataError(f"{where} lacks the field 'train_context', the paragraph itself.")
    versions = (
        _text(entry["train_context"], f"{where}, field 'train_context'"),
        *_texts(entry.get("paraphrases", []), f"{where}, field 'paraphrases'"),
    )
    probes: dict[str, tuple[tuple[str, str], ...]] = {}
    for level, prefix in LEVELS.items():
        sides = {
            part: _texts(entry.get(f"{prefix}_{part}", []), f"{where}, field '{prefix}_{part}'")
            for part in ("input", "target")
        }
        if len(sides["input"]) != len(sides["target"]):
            raise DataError(
                f"{where} has {len(sides['input'])} '{prefix}_input' but {len(sides['target'])} "
                f"'{prefix}_target'; each context needs exactly one target."
            )
        probes[level] = tuple(zip(sides["input"], sides["target"], strict=True))
    fact = Fact(versions, probes)
    if fact.num_probes == 0:
        raise DataError(
            f"{where} has no probe; give at least one pair such as 'mem_input' and 'mem_target'."
        )
    return fact


def parse_facts(entries: Any, setting: str, *, source: str = "facts") -> FactSet:
    """Check a decoded JSON value.

    Args:
        entries: what ``json.load`` gave.
        setting: ``once`` or ``paraphrase``.
        source: a name for messages.

    Raises:
        DataError: names the entry and the field at fault.
    """
    if setting not in SETTINGS:
        raise DataError(
            f"Setting '{setting}' is not one of {SETTINGS}.{nearest(setting, SETTINGS)}"
        )
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise DataError(f"{source} holds {type(entries).__name__}, expected a list of entries.")
    if not entries:
        raise DataError(f"{source} is an empty list; give at least one entry.")
    facts = tuple(
        _parse_entry(entry, f"{source}, entry {index}") for index, entry in enumerate(entries)
    )
    return FactSet(setting, facts, source)


def load_facts(path: str | os.PathLike[str], setting: str) -> FactSet:
    """Read and check a facts file (path or URI).

    Args:
        path: a JSON file in the schema of this module.
        setting: ``once`` or ``paraphrase``.

    Raises:
        DataError: no such file, not JSON, or an entry that is not valid.
    """
    source = os.fspath(path)
    try:
        raw = storage.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"There is no facts file '{source}'.") from error
    if len(raw) > _MAX_BYTES:
        raise DataError(f"'{source}' has {len(raw)} bytes; a facts file has at most 1 GiB.")
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0] if str(error) else "nested too deeply"
        raise DataError(f"'{source}' is not JSON: {detail[:200]}.") from error
    return parse_facts(entries, setting, source=f"'{source}'")
