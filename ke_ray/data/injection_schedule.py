"""The injection schedule: which text enters which row of the batch at which injection.

A schedule is a list of rows; each puts one version of one paragraph into one row of the batch at
one *injection* (numbered from 1). The paper's schedule (docs/science.md#injection) is that of
``schedule_from_facts``: at injection k of n, version k−1 of every *paraphrase* paragraph (rows 0,
1, …), then group k of the *once* paragraphs in version 0 (the rows after).

Departures, for facts other than the paper's: with fewer versions than injections the versions
start again; *once* groups are contiguous and, where n does not divide their number, sizes differ
by at most one (larger groups first).

A file is JSON or YAML, ``{"rows": [...], "spread": false}`` or the bare list of rows, or Parquet
with the same columns. A row has ``injection`` (or, in all rows, ``step``: a training step, counted
from 1), ``row``, ``setting``, ``instance``, ``version`` and optionally ``token_ids`` (with the
final end-of-text id) or ``text`` (without it); where both are absent the facts supply the text.
The published table's names ``injection_step`` and ``split`` are read as ``injection`` and
``setting``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AliasChoices, Field, model_validator

from ke_ray import storage
from ke_ray.config import Strict, validate
from ke_ray.data.facts import FactSet, Setting, Text
from ke_ray.data.sources import reading
from ke_ray.data.text_file import parse_json, read_text
from ke_ray.errors import DataError
from ke_ray.storage.safe_yaml import parse_yaml

_MAX_BYTES = 256 << 20
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ScheduledText:
    """One row of a schedule.

    Attributes:
        injection: number of the injection, from 1.
        row: row of the global batch, from 0.
        setting: ``once`` or ``paraphrase``.
        instance: the paragraph's index in its facts file.
        version: 0 is the paragraph itself, k its k-th paraphrase.
        text: the text without end-of-text, or None.
        token_ids: the ids with the final end-of-text, or None.
    """

    injection: int
    row: int
    setting: str
    instance: int
    version: int
    text: str | None = None
    token_ids: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The row's name in messages."""
        return (
            f"schedule row (injection {self.injection}, row {self.row}, {self.setting} "
            f"{self.instance}, version {self.version})"
        )


@dataclass(frozen=True)
class Schedule:
    """Rows ordered by injection and row.

    Attributes:
        rows: all rows.
        steps: training step of each injection where the file gives steps, else None (an interval
            decides).
        spread: whether a batch below 128 rows gets the texts divided over all its rows; a rule's
            schedule does, a file's rows are taken as they are unless it says ``spread: true``.
    """

    rows: tuple[ScheduledText, ...]
    steps: Mapping[int, int] | None = None
    spread: bool = False

    @property
    def num_injections(self) -> int:
        """The highest injection number; an injection without rows injects nothing."""
        return max(row.injection for row in self.rows)

    def at(self, injection: int) -> tuple[ScheduledText, ...]:
        """The rows of one injection, by batch row."""
        return tuple(row for row in self.rows if row.injection == injection)


def contiguous_groups(count: int, num_groups: int) -> list[range]:
    """``count`` items in contiguous groups whose sizes differ by at most one, larger ones first."""
    size, larger = divmod(count, num_groups)
    starts = [index * size + min(index, larger) for index in range(num_groups + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def schedule_from_facts(
    fact_sets: Sequence[FactSet], *, num_injections: int | None = None
) -> Schedule:
    """The schedule that the published rule gives for facts.

    Args:
        fact_sets: at most one set per setting; paraphrase rows come first whatever the order.
        num_injections: default: the largest number of versions of a *paraphrase* fact, or 10
            where there is none.

    Raises:
        DataError: a setting twice, no facts, or fewer than one injection.
    """
    by_setting: dict[str, FactSet] = {}
    for facts in fact_sets:
        if facts.setting in by_setting:
            raise DataError(
                f"There are two sets of '{facts.setting}' facts; merge them into one file."
            )
        by_setting[facts.setting] = facts
    if not by_setting:
        raise DataError("No facts to schedule; give a 'paraphrase' or a 'once' file.")
    no_facts = FactSet("once", ())
    paraphrase = by_setting.get("paraphrase", no_facts).facts
    once = by_setting.get("once", no_facts).facts
    if num_injections is None:
        num_injections = max((len(fact.versions) for fact in paraphrase), default=10)
    if num_injections < 1:
        raise DataError(f"num_injections is {num_injections}; it must be at least 1.")
    groups = contiguous_groups(len(once), num_injections)
    rows = []
    for injection in range(1, num_injections + 1):
        for instance, fact in enumerate(paraphrase):
            version = (injection - 1) % len(fact.versions)
            text = fact.versions[version]
            rows.append(ScheduledText(injection, instance, "paraphrase", instance, version, text))
        for row, instance in enumerate(groups[injection - 1], start=len(paraphrase)):
            text = once[instance].versions[0]
            rows.append(ScheduledText(injection, row, "once", instance, 0, text))
    return Schedule(tuple(rows), spread=True)


_FromZero = Annotated[int, Field(ge=0, le=_INT32_MAX)]
_FromOne = Annotated[int, Field(ge=1, le=_INT32_MAX)]


class _Row(Strict, strict=True):
    """A row of a file; the aliases are the names of the published table."""

    injection: _FromOne | None = Field(
        None, validation_alias=AliasChoices("injection", "injection_step")
    )
    step: _FromOne | None = None
    row: _FromZero
    setting: Setting = Field(validation_alias=AliasChoices("setting", "split"))
    instance: _FromZero
    version: _FromZero
    text: Text | None = None
    token_ids: Annotated[tuple[_FromZero, ...], Field(strict=False, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_row(self) -> Self:
        if (self.injection is None) == (self.step is None):
            raise ValueError("give either 'injection' or 'step', and not both")
        if self.token_ids == ():
            raise ValueError("'token_ids' is empty; give the ids or leave the key out")
        return self


class _ScheduleFile(Strict, strict=True):
    rows: Annotated[list[_Row], Field(fail_fast=True)]
    spread: bool = False


def _parse_schedule(value: Any, source: str) -> Schedule:
    values = {"rows": value} if isinstance(value, list) else value
    file = validate(_ScheduleFile, values, source, DataError)
    if not file.rows:
        raise DataError(f"{source} has no schedule rows; give at least one.")
    numbers = {
        step: number
        for number, step in enumerate(sorted({row.step for row in file.rows if row.step}), start=1)
    }
    if numbers and any(row.step is None for row in file.rows):
        raise DataError(f"{source} mixes rows with 'step' and with 'injection'; use one of them.")
    rows = sorted(
        (
            ScheduledText(
                row.injection or numbers[row.step or 0],
                *(row.row, row.setting, row.instance, row.version, row.text, row.token_ids),
            )
            for row in file.rows
        ),
        key=lambda text: (text.injection, text.row),
    )
    for before, after in itertools.pairwise(rows):
        if (before.injection, before.row) == (after.injection, after.row):
            raise DataError(
                f"{source} puts two texts into one row of one injection: {before.name} and "
                f"{after.name}. Change 'row' of one of them."
            )
    steps = {number: step for step, number in numbers.items()}
    return Schedule(tuple(rows), steps or None, file.spread)


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule from ``.json``, ``.yaml``/``.yml`` or ``.parquet`` (path or URI).

    Raises:
        DataError: no such file, another format, or a row that is not valid (named).
        ConfigError: not YAML.
        StorageError: not Parquet.
    """
    source = f"'{os.fspath(path)}'"
    suffix = os.fspath(path).rsplit(".", 1)[-1].lower()
    if suffix == "parquet":
        with reading(os.fspath(path)):
            return _parse_schedule(storage.read_table(path).to_pylist(), source)
    if suffix not in ("json", "yaml", "yml"):
        raise DataError(f"{source} is no schedule: expected .json, .yaml or .parquet.")
    text = read_text(path, "a schedule", max_bytes=_MAX_BYTES)
    if suffix == "json":
        return _parse_schedule(parse_json(text, source), source)
    return _parse_schedule(parse_yaml(text, source, max_characters=_MAX_BYTES), source)
