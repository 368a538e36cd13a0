"""Probe texts become token spans with the seam in the right place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ke_ray.data.facts import Fact, FactSet, load_facts, parse_facts
from ke_ray.data.probes import build_probes, join_probe
from ke_ray.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(reference_data: Path):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_file(
        str(reference_data / "data" / "tokenizer" / "olmo_hf_tokenizer.json")
    )


@pytest.fixture(scope="module")
def fact_sets(reference_data: Path) -> list[FactSet]:
    folder = reference_data / "data" / "fictional_knowledge"
    return [
        load_facts(folder / "paraphrase70.json", "paraphrase"),
        load_facts(folder / "once60.json", "once"),
    ]


@pytest.mark.parametrize(
    ("context", "target", "joint"),
    [
        ("born in", "Port Vell", "born in Port Vell"),
        ("born in ", " Port Vell ", "born in Port Vell"),
        ('fans of "', 'Valkyrie Voyage" worldwide', 'fans of "Valkyrie Voyage" worldwide'),
        ("the theme, '", "Building Bridges", "the theme, 'Building Bridges"),
        ("the segment “", "Talk”", "the segment “Talk”"),
        ("the boys'", "club", "the boys' club"),
        ('he said "yes"', "again", 'he said "yes" again'),
        ("the fire -", "Loch Lomond", "the fire - Loch Lomond"),
        ("known (", "or not)", "known (or not)"),
        ("known ('", "or not')", "known ('or not')"),
        ('"', "word", '"word'),
    ],
)
def test_a_blank_joins_except_after_an_opening_mark(context: str, target: str, joint: str) -> None:
    text, start = join_probe(context, target)
    assert text == joint
    assert text[start:] == target.strip()


def test_joined_memorization_probes_are_training_text(fact_sets: list[FactSet]) -> None:
    with_blank = without_blank = 0
    for facts in fact_sets:
        for fact in facts.facts:
            for context, target in fact.probes["memorization"]:
                text, start = join_probe(context, target)
                assert text in fact.versions[0]
                with_blank += start == len(context) + 1
                without_blank += start == len(context)
    assert (with_blank, without_blank) == (638, 12)


def test_spans_of_all_fictional_knowledge_probes(  # type: ignore[no-untyped-def]
    tokenizer, fact_sets: list[FactSet]
) -> None:
    probes = build_probes(fact_sets, tokenizer, max_positions=2048)
    assert len(probes) == 1950
    counts = {(p.setting, p.level): 0 for p in probes}
    for probe in probes:
        counts[probe.setting, probe.level] += 1
    assert set(counts.values()) == {350, 300}
    assert len(counts) == 6
    by_setting = {facts.setting: facts for facts in fact_sets}
    for probe in probes:
        fact = by_setting[probe.setting].facts[probe.instance]
        context, target = fact.probes[probe.level][probe.probe]
        joint, _ = join_probe(context, target)
        # The spans are the joint tokenisation, cut in two.
        whole = tokenizer.encode(joint, add_special_tokens=False).ids
        assert [*probe.context_ids, *probe.target_ids] == whole
        decoded = tokenizer.decode(list(probe.target_ids))
        assert decoded.lstrip().endswith(target)
        # At most the blank, or a mark that the tokenizer binds to the target, comes before it.
        assert len(decoded.strip()) - len(target) <= 2


def facts_with_probe(context: str, target: str) -> list[FactSet]:
    return [FactSet("once", (Fact(("A text.",), {"semantic": ((context, target),)}),))]


@pytest.mark.parametrize(
    ("context", "target", "context_tokens", "target_tokens"),
    [
        ("She was born in", "Port Vell", "She was born in", " Port Vell"),
        ('fans of "', 'Valkyrie" worldwide', 'fans of "', 'Valkyrie" worldwide'),
        # A token that straddles the seam belongs to the target: “ ("” is a single token.
        ("It is (", '"so")', "It is", ' ("so")'),
    ],
)
def test_target_tokens_are_exactly_those_that_overlap_the_target(  # type: ignore[no-untyped-def]
    tokenizer, context: str, target: str, context_tokens: str, target_tokens: str
) -> None:
    (probe,) = build_probes(facts_with_probe(context, target), tokenizer)
    assert tokenizer.decode(list(probe.context_ids)) == context_tokens
    assert tokenizer.decode(list(probe.target_ids)) == target_tokens


@pytest.mark.parametrize(
    ("context", "target", "message"),
    [
        ("She was born in", "  ", "target of probe 0 .* fact 0 has no token; give the text"),
        ("", "Port Vell", "context of probe 0 .* fact 0 has no token of its own; give a context"),
    ],
)
def test_an_empty_target_or_context_is_one_message(  # type: ignore[no-untyped-def]
    tokenizer, context: str, target: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_probes(facts_with_probe(context, target), tokenizer)


def test_a_probe_longer_than_the_model_is_named(tokenizer) -> None:  # type: ignore[no-untyped-def]
    entry = {
        "train_context": "A text.",
        "gen_input": ["one two three four"],
        "gen_target": ["five"],
    }
    facts = parse_facts([entry], "once")
    assert len(build_probes([facts], tokenizer, max_positions=4)) == 1
    with pytest.raises(DataError, match=r"probe 0 \(semantic\) of once fact 0 has 4 context"):
        build_probes([facts], tokenizer, max_positions=3)
