"""Hostile schedule files end in a schedule or in one DataError."""

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
from ke_ray.errors import DataError

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
        ([ROW | {"row": -1}], "row 0, 'row' is a number out of range"),
        ([ROW, ROW | {"row": 1.5}], "row 1, 'row' is 1.5"),
        ([ROW | {"row": True}], "'row' is a number out of range"),
        ([ROW | {"step": 3}], "either 'injection' or 'step'"),
        ([ROW, ROW], "two texts in one place"),
        ([ROW | {"setting": "twice"}], "not one of"),
        ([ROW | {"txt": "a"}], "unknown field 'txt'. Did you mean 'text'"),
        ([ROW | {"text": " "}], "'text' is not a text or is empty"),
        ([ROW | {"token_ids": [1, -2]}], "'token_ids'"),
        ([{k: v for k, v in ROW.items() if k != "version"}], "lacks the field 'version'"),
        ([], "no list of schedule rows"),
        ({"rows": [ROW], "spread": 1}, "'spread'"),
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
    with pytest.raises(DataError):
        read(tmp_path, "yaml", text)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("suffix", ["json", "yaml", "parquet", "pkl"])
def test_a_pickle_is_never_loaded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read(tmp_path, suffix, pickle.dumps(Evil()))
    assert not Path("evil-was-here").exists()


def test_a_parquet_file_of_other_columns_is_one_message(tmp_path: Path) -> None:
    import pyarrow

    storage.write_table(tmp_path / "t.parquet", pyarrow.table({"a": [1]}))
    with pytest.raises(DataError, match="unknown field 'a'"):
        load_schedule(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no schedule file"):
        load_schedule(tmp_path / "absent.parquet")


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
def test_mutated_schedules_give_a_schedule_or_one_data_error(
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
    except DataError as error:
        message = str(error)
    assert (schedule is not None and schedule.rows) or f"schedule.{suffix}" in message
