"""Hostile schedule files end in a schedule or in one error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_ray import storage
from ke_ray.data.injection_schedule import Schedule, load_schedule, schedule_from_facts
from ke_ray.errors import DataError, UserError

ROW: dict[str, Any] = {
    "injection": 1, "row": 0, "setting": "once", "instance": 0, "version": 0, "text": "A text.",
}  # fmt: skip


def read(folder: Path, suffix: str, content: str | bytes) -> Schedule:
    path = folder / f"schedule.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_schedule(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"row": -1}], "'rows.0.row': .*given: -1"),
        ([ROW | {"row": 2**31}], "'rows.0.row': .*given: 2147483648"),
        ([ROW, ROW | {"row": 1.5}], "'rows.1.row': .*integer.*given: 1.5"),
        ([ROW | {"row": True}], "'rows.0.row': .*integer.*given: True"),
        ([ROW | {"injection": 0}], "'rows.0.injection': .*given: 0"),
        ([ROW | {"step": 3}], "'rows.0': give either 'injection' or 'step'"),
        ([ROW, ROW], "two texts into one row .*injection 1, row 0.* Change 'row'"),
        ([ROW | {"setting": "twice"}], "'rows.0.setting': .*'once' or 'paraphrase'.*'twice'"),
        ([ROW | {"txt": "a"}], "unknown key 'rows.0.txt'. Did you mean 'text'?"),
        ([ROW | {"text": " "}], "'rows.0.text': The text is empty"),
        ([ROW | {"text": "\ud83d"}], "'rows.0.text': .*half of a surrogate pair"),
        ([ROW | {"token_ids": [1, -2]}], "'rows.0.token_ids.1': .*given: -2"),
        ([ROW | {"token_ids": []}], "'rows.0': 'token_ids' is empty"),
        ([{k: v for k, v in ROW.items() if k != "version"}], "'rows.0.version' is missing"),
        ([], "no schedule rows; give at least one"),
        ({"rows": [ROW], "spread": 1}, "'spread': .*boolean.*given: 1"),
        ({"rows": [ROW], "interval": 4}, "unknown key 'interval'"),
        ([ROW, {**{k: v for k, v in ROW.items() if k != "injection"}, "step": 2}], "mixes rows"),
    ],
)
def test_the_row_at_fault_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        read(tmp_path, "json", json.dumps(rows))


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nrows: *x",
        "[" * 50_000,
        "- " * 50_000,
        "!!python/object/apply:os.system ['true']",
        "rows: [\x00]",
        "{1: 2",
        "",
        "? [a]\n: b",
    ],
)
def test_hostile_yaml_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read(tmp_path, "yaml", text)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("suffix", ["json", "yaml", "parquet", "pkl"])
def test_a_pickle_is_never_loaded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        read(tmp_path, suffix, pickle.dumps(Evil()))
    assert not Path("evil-was-here").exists()


def test_a_parquet_file_of_other_columns_is_one_message(tmp_path: Path) -> None:
    import pyarrow

    storage.write_table(tmp_path / "t.parquet", pyarrow.table({"a": [1]}))
    with pytest.raises(DataError, match="unknown key 'rows.0.a'"):
        load_schedule(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="There is no .*absent.parquet"):
        load_schedule(tmp_path / "absent.parquet")


def test_a_yaml_schedule_may_be_larger_than_a_study(tmp_path: Path) -> None:
    rows = [ROW | {"row": row, "text": "a" * (1 << 20)} for row in range(5)]
    schedule = read(tmp_path, "yaml", json.dumps(rows))
    assert len(schedule.rows) == 5


def test_no_facts_and_facts_given_twice_are_refused() -> None:
    with pytest.raises(DataError, match="No facts"):
        schedule_from_facts([])


BASE = json.dumps({"rows": [ROW, ROW | {"row": 1, "token_ids": [3, 4]}], "spread": True})
YAML_BASE = (
    "spread: true\nrows:\n- {injection: 1, row: 0, setting: once, instance: 0, version: 0}\n"
    "- injection: 2\n  row: 1\n  setting: paraphrase\n  instance: 0\n  version: 1\n"
    "  text: 'It is'\n"
)


@settings(max_examples=1000, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["json", "yaml"]))
def test_mutated_schedules_give_a_schedule_or_one_error(
    data: st.DataObject, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray((BASE if suffix == "json" else YAML_BASE).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(raw) - 1)))
        raw[place : place + data.draw(st.integers(0, 12))] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"[", b"{", b"- ", b"*a", b"&a ", b"null", b"1e9", b"\xff", b": "])
        )
    schedule, message = None, ""
    try:
        schedule = read(tmp_path_factory.getbasetemp(), suffix, bytes(raw))
    except UserError as error:
        message = str(error)
    assert (schedule is not None and schedule.rows) or f"schedule.{suffix}" in message
