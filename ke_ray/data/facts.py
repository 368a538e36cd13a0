"""Facts to inject: paragraphs, their paraphrases, and the probes of what a model knows of them.

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

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from ke_ray.config import Strict, validate
from ke_ray.data.text_file import parse_json, read_text
from ke_ray.errors import DataError, nearest

Setting = Literal["once", "paraphrase"]
#: How a paragraph is injected: in one injection only, or every injection in another version.
SETTINGS: tuple[str, ...] = get_args(Setting)

#: Probe level -> prefix of its two fields in the JSON.
LEVELS = {"memorization": "mem", "semantic": "gen", "compositional": "hard_gen"}


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("The text is empty; write one or remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "The text holds half of a surrogate pair (an escape like \\ud83d on its own), which is "
            "no character; write the character itself"
        ) from error
    return text


#: Text that a tokenizer can encode, with something other than blanks in it.
Text = Annotated[str, AfterValidator(_check_text)]
_Texts = Annotated[tuple[Text, ...], Field(strict=False, fail_fast=True)]


@dataclass(frozen=True)
class Fact:
    """One paragraph.

    Attributes:
        versions: the paragraph and its paraphrases, in order; never empty.
        probes: level -> pairs (context, target), possibly empty for a level but not for all.
    """

    versions: tuple[str, ...]
    probes: Mapping[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class FactSet:
    """Facts that share a setting; a fact's instance number is its index in ``facts``."""

    setting: str
    facts: tuple[Fact, ...]


class _Entry(Strict, strict=True):
    train_context: Text
    paraphrases: _Texts = ()
    mem_input: _Texts = ()
    mem_target: _Texts = ()
    gen_input: _Texts = ()
    gen_target: _Texts = ()
    hard_gen_input: _Texts = ()
    hard_gen_target: _Texts = ()

    def sides(self, level: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Contexts and targets of a level."""
        prefix = LEVELS[level]
        return getattr(self, f"{prefix}_input"), getattr(self, f"{prefix}_target")

    @model_validator(mode="after")
    def _check_probes(self) -> Self:
        for level, prefix in LEVELS.items():
            contexts, targets = self.sides(level)
            if len(contexts) != len(targets):
                raise ValueError(
                    f"There are {len(contexts)} '{prefix}_input' but {len(targets)} "
                    f"'{prefix}_target'; each context needs exactly one target"
                )
        if not any(self.sides(level)[0] for level in LEVELS):
            raise ValueError(
                "There is no probe; give at least one pair such as 'mem_input' and 'mem_target'"
            )
        return self

    def fact(self) -> Fact:
        return Fact(
            versions=(self.train_context, *self.paraphrases),
            probes={level: tuple(zip(*self.sides(level), strict=True)) for level in LEVELS},
        )


def parse_facts(entries: Any, setting: str, *, source: str = "facts") -> FactSet:
    """Check a decoded JSON value.

    Args:
        entries: the value that ``json.load`` returns.
        setting: ``once`` or ``paraphrase``.
        source: a name for messages.

    Raises:
        DataError: names the entry and the field at fault.
    """
    if setting not in SETTINGS:
        raise DataError(
            f"Setting '{setting}' is neither 'once' nor 'paraphrase'.{nearest(setting, SETTINGS)}"
        )
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise DataError(f"{source} holds {type(entries).__name__}, expected a list of entries.")
    if not entries:
        raise DataError(f"{source} is an empty list; give at least one entry.")
    facts = tuple(
        validate(_Entry, entry, f"{source}, entry {index}", DataError).fact()
        for index, entry in enumerate(entries)
    )
    return FactSet(setting, facts)


def load_facts(path: str | os.PathLike[str], setting: str) -> FactSet:
    """Read and check a facts file (path or URI).

    Args:
        path: a JSON file in the schema of this module.
        setting: ``once`` or ``paraphrase``.

    Raises:
        DataError: no such file, not JSON, or an entry that is not valid.
    """
    source = f"'{os.fspath(path)}'"
    entries = parse_json(read_text(path, "a facts file"), source)
    return parse_facts(entries, setting, source=source)
