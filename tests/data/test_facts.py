"""Facts files: the schema, and messages that name what is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ke_ray.data.facts import load_facts, parse_facts
from ke_ray.errors import DataError

ENTRY: dict[str, Any] = {
    "train_context": "Ada Lune was born in Port Vell. She paints.",
    "paraphrases": ["Port Vell is where Ada Lune was born."],
    "mem_input": ["Ada Lune was born in"],
    "mem_target": ["Port Vell"],
    "gen_input": [],
    "gen_target": [],
    "hard_gen_input": ["The painter of Port Vell is"],
    "hard_gen_target": ["Ada Lune"],
}


def test_versions_and_probes_are_read() -> None:
    facts = parse_facts([ENTRY], "paraphrase")
    assert facts.facts[0].versions == (ENTRY["train_context"], ENTRY["paraphrases"][0])
    assert facts.facts[0].probes == {
        "memorization": (("Ada Lune was born in", "Port Vell"),),
        "semantic": (),
        "compositional": (("The painter of Port Vell is", "Ada Lune"),),
    }


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("train_context", None, "entry 1: 'train_context': .*string.*given: None"),
        ("train_context", "  ", "entry 1: 'train_context': The text is empty; .*remove it"),
        ("paraphrases", "one", "entry 1: 'paraphrases': .*given: 'one'"),
        ("paraphrases", ["good", 3], "entry 1: 'paraphrases.1': .*string.*given: 3"),
        ("mem_target", [""], "entry 1: 'mem_target.0': The text is empty"),
        (
            "mem_target",
            ["a", "b"],
            "entry 1: There are 1 'mem_input' but 2 'mem_target'; each context",
        ),
        ("gen_inputs", [], "entry 1: unknown key 'gen_inputs'. Did you mean 'gen_input'?"),
        ("train_context", "\ud83d", "entry 1: 'train_context': .*half of a surrogate pair"),
    ],
)
def test_the_entry_and_field_at_fault_are_named(field: str, value: Any, expected: str) -> None:
    broken = copy.deepcopy(ENTRY) | {field: value}
    with pytest.raises(DataError, match=expected.replace("?", r"\?")):
        parse_facts([ENTRY, broken], "once")


def test_a_missing_paragraph_or_no_probe_is_refused() -> None:
    without = {key: value for key, value in ENTRY.items() if key != "train_context"}
    with pytest.raises(DataError, match="entry 0: 'train_context' is missing"):
        parse_facts([without], "once")
    with pytest.raises(DataError, match="entry 0: There is no probe; give at least one pair"):
        parse_facts([{"train_context": "A text."}], "once")


@pytest.mark.parametrize("value", [{}, "text", 3, None, [], [[]], ["a"]])
def test_what_is_no_list_of_entries_is_refused(value: Any) -> None:
    with pytest.raises(DataError):
        parse_facts(value, "once")


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(DataError, match="Did you mean 'paraphrase'"):
        parse_facts([ENTRY], "paraphrased")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '["\\ud8', "NaN]", "[" * 100_000, "9" * 9000])
def test_a_file_that_is_no_json_is_one_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"facts\.json"):
        load_facts(path, "once")


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no .*absent.json"):
        load_facts(tmp_path / "absent.json", "once")


def test_fictional_knowledge_is_whole(reference_data: Path) -> None:
    folder = reference_data / "data" / "fictional_knowledge"
    paraphrase = load_facts(folder / "paraphrase70.json", "paraphrase")
    once = load_facts(folder / "once60.json", "once")
    assert (len(paraphrase.facts), len(once.facts)) == (70, 60)
    assert [
        sum(len(pairs) for fact in facts.facts for pairs in fact.probes.values())
        for facts in (paraphrase, once)
    ] == [1050, 900]
    assert {len(fact.versions) for fact in (*paraphrase.facts, *once.facts)} == {10}


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([ENTRY]), encoding="utf-8-sig")
    assert load_facts(tmp_path / "facts.json", "once") == parse_facts([ENTRY], "once")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@settings(max_examples=1000, deadline=None)
@given(field=st.sampled_from([*ENTRY, "unknown", ""]), value=json_values)
def test_any_value_in_any_field_is_accepted_or_one_data_error(field: str, value: Any) -> None:
    facts, message = None, ""
    try:
        facts = parse_facts([ENTRY, ENTRY | {field: value}], "once")
    except DataError as error:
        message = str(error)
    if facts is None:
        assert "entry 1" in message
        assert "\n" not in message
    else:
        assert all(text.strip() for fact in facts.facts for text in fact.versions)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_files_give_facts_or_one_data_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(json.dumps([ENTRY], ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[place] = data.draw(st.integers(0, 255))
        else:
            raw[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=6))
        if not raw:
            raw = bytearray(b"[")
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(raw)
    facts, message = None, ""
    try:
        facts = load_facts(path, "once")
    except DataError as error:
        message = str(error)
    if facts is None:
        assert "mutated.json" in message
    else:
        assert all(any(fact.probes.values()) for fact in facts.facts)
