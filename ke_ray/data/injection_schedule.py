"""Which text is injected when and where, as data.

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
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ke_ray import storage
from ke_ray.data.facts import SETTINGS, FactSet
from ke_ray.errors import DataError, StorageError, nearest

__all__ = [
    "Schedule",
    "ScheduledText",
    "contiguous_groups",
    "load_schedule",
    "save_schedule",
    "schedule_from_facts",
]

_ALIASES = {"injection_step": "injection", "split": "setting"}
_INTEGERS = ("injection", "step", "row", "instance", "version")
_KEYS = (*_INTEGERS, "setting", "text", "token_ids")
_MAX_BYTES = 256 << 20
_MAX_DEPTH = 8
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ScheduledText:
    """One row of a schedule.

    Attributes:
        injection: number of the injection, from 1.
        row: row of the global batch, from 0.
        setting: ``once`` or ``paraphrase``.
        instance: the paragraph's place in its facts file.
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
        """How messages call it."""
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
    """The published rule applied to facts.

    Args:
        fact_sets: at most one set of each setting; paraphrase rows come first whatever the order.
        num_injections: default: the largest number of versions of a *paraphrase* fact, or 10
            where there is none.

    Raises:
        DataError: a setting twice, no facts, or fewer than one injection.
    """
    by_setting: dict[str, FactSet] = {}
    for facts in fact_sets:
        if facts.setting in by_setting:
            raise DataError(f"Two sets of '{facts.setting}' facts; merge them into one file.")
        by_setting[facts.setting] = facts
    if not by_setting:
        raise DataError("No facts to schedule; give a 'paraphrase' or a 'once' file.")
    paraphrased = by_setting["paraphrase"].facts if "paraphrase" in by_setting else ()
    num_once = len(by_setting["once"].facts) if "once" in by_setting else 0
    if num_injections is None:
        num_injections = max((len(fact.versions) for fact in paraphrased), default=10)
    if num_injections < 1:
        raise DataError(f"num_injections is {num_injections}; at least 1 is needed.")
    groups = contiguous_groups(num_once, num_injections)
    rows = []
    for injection in range(1, num_injections + 1):
        for instance, fact in enumerate(paraphrased):
            version = (injection - 1) % len(fact.versions)
            text = fact.versions[version]
            rows.append(ScheduledText(injection, instance, "paraphrase", instance, version, text))
        for place, instance in enumerate(groups[injection - 1]):
            text = by_setting["once"].facts[instance].versions[0]
            rows.append(
                ScheduledText(injection, len(paraphrased) + place, "once", instance, 0, text)
            )
    return Schedule(tuple(rows), spread=True)


def _integer(value: Any, key: str, where: str) -> int:
    low = 1 if key in ("injection", "step") else 0
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _INT32_MAX:
        shown = repr(value)[:60] if not isinstance(value, int) else "a number out of range"
        raise DataError(f"{where}, '{key}' is {shown}; expected a whole number from {low}.")
    return value


def _parse_row(value: Any, where: str) -> tuple[dict[str, Any], int | None]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {type(value).__name__}, expected an object with its fields.")
    row: dict[str, Any] = {}
    for key, item in value.items():
        name = _ALIASES.get(key, key) if isinstance(key, str) else str(key)[:60]
        if name not in _KEYS:
            raise DataError(f"{where} has an unknown field '{name[:60]}'.{nearest(name, _KEYS)}")
        if item is not None:
            row[name] = _integer(item, name, where) if name in _INTEGERS else item
    for key in ("row", "setting", "instance", "version"):
        if key not in row:
            raise DataError(f"{where} lacks the field '{key}'.")
    if ("injection" in row) == ("step" in row):
        raise DataError(f"{where} needs either 'injection' or 'step', and not both.")
    if not isinstance(row["setting"], str) or row["setting"] not in SETTINGS:
        raise DataError(f"{where}, 'setting' is {row['setting']!r:.60}, not one of {SETTINGS}.")
    text = row.get("text")
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise DataError(f"{where}, 'text' is not a text or is empty.")
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}, 'text' holds half of a surrogate pair, which is no character.")
    if "token_ids" in row:
        ids = row["token_ids"]
        if not isinstance(ids, list) or not ids:
            raise DataError(f"{where}, 'token_ids' is not a list of token ids, or is empty.")
        row["token_ids"] = tuple(_integer(item, "token_ids", where) for item in ids)
    return row, row.pop("step", None)


def _parse_schedule(value: Any, source: str) -> Schedule:
    spread = False
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("rows", "spread"):
                raise DataError(
                    f"{source} has an unknown key '{str(key)[:60]}'; valid: rows, spread."
                )
        spread = value.get("spread", False)
        if not isinstance(spread, bool):
            raise DataError(f"{source}: 'spread' is {spread!r:.60}, expected true or false.")
        value = value.get("rows")
    if not isinstance(value, list) or not value:
        raise DataError(f"{source} has no list of schedule rows; give at least one row.")
    parsed = [_parse_row(item, f"{source}, row {index}") for index, item in enumerate(value)]
    with_steps = sum(step is not None for _, step in parsed)
    if with_steps not in (0, len(parsed)):
        raise DataError(f"{source} mixes rows with 'step' and with 'injection'; use one of them.")
    steps = None
    if with_steps:
        ordered = sorted({step for _, step in parsed if step is not None})
        steps = dict(enumerate(ordered, start=1))
        numbers = {step: number for number, step in steps.items()}
        for row, step in parsed:
            if step is not None:
                row["injection"] = numbers[step]
    rows = tuple(
        sorted((ScheduledText(**row) for row, _ in parsed), key=lambda r: (r.injection, r.row))
    )
    for before, after in itertools.pairwise(rows):
        if (before.injection, before.row) == (after.injection, after.row):
            raise DataError(f"{source}: two texts in one place: {before.name} and {after.name}.")
    return Schedule(rows, steps, spread)


def _yaml(text: str, source: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for token in yaml.scan(text, Loader=loader):
        if isinstance(token, yaml.AliasToken):
            raise DataError(f"{source} uses YAML aliases (*name); write the values out.")
        if isinstance(
            token,
            yaml.BlockMappingStartToken
            | yaml.BlockSequenceStartToken
            | yaml.FlowMappingStartToken
            | yaml.FlowSequenceStartToken,
        ):
            depth += 1
        elif isinstance(
            token, yaml.BlockEndToken | yaml.FlowMappingEndToken | yaml.FlowSequenceEndToken
        ):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise DataError(f"{source} is nested deeper than a schedule can be.")
    return yaml.load(text, Loader=loader)  # noqa: S506 (a safe loader either way)


def load_schedule(path: str | os.PathLike[str]) -> Schedule:
    """Read a schedule from ``.json``, ``.yaml``/``.yml`` or ``.parquet`` (path or URI).

    Raises:
        DataError: no such file, another format, or a row that is not valid (named).
    """
    source = f"'{os.fspath(path)}'"
    kind = os.fspath(path).rsplit(".", 1)[-1].lower()
    if kind not in ("json", "yaml", "yml", "parquet"):
        raise DataError(f"{source} is no schedule: expected .json, .yaml or .parquet.")
    try:
        if kind == "parquet":
            return _parse_schedule(storage.read_table(path).to_pylist(), source)
        raw = storage.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"There is no schedule file {source}.") from error
    except (StorageError, ValueError, OSError) as error:
        raise DataError(f"{source} is not a readable schedule: {str(error)[:200]}") from error
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{source} has {len(raw)} bytes; a schedule has at most 256 MiB.")
    try:
        text = raw.decode("utf-8")
        value = json.loads(text) if kind == "json" else _yaml(text, source)
    except DataError:
        raise
    except Exception as error:  # the parsers raise many kinds on hostile text
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = "JSON" if kind == "json" else "YAML"
        raise DataError(f"{source} is not valid {name}: {problem[:200]}.") from error
    return _parse_schedule(value, source)


def _plain_rows(schedule: Schedule) -> Iterable[dict[str, Any]]:
    for row in schedule.rows:
        when = (
            {"injection": row.injection}
            if schedule.steps is None
            else {"step": schedule.steps[row.injection]}
        )
        plain = {
            **when,
            "row": row.row,
            "setting": row.setting,
            "instance": row.instance,
            "version": row.version,
        }
        if row.text is not None:
            plain["text"] = row.text
        if row.token_ids is not None:
            plain["token_ids"] = list(row.token_ids)
        yield plain


def save_schedule(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write ``.json`` or ``.yaml`` so that ``load_schedule`` gives the same schedule.

    Raises:
        DataError: another suffix.
    """
    target = os.fspath(path)
    value = {"spread": schedule.spread, "rows": list(_plain_rows(schedule))}
    if target.endswith(".json"):
        storage.write_atomic(target, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    elif target.endswith((".yaml", ".yml")):
        import yaml

        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=1000)
        storage.write_atomic(target, text)
    else:
        raise DataError(f"'{target}': a schedule is written as .json or .yaml.")
