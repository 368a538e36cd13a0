"""The generated world: reproducible, consistent with itself, and askable."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ke_ray.data.biographies import (
    BiographyFiles,
    iter_biographies,
    make_facts,
    make_people,
    make_questions,
    write_biographies,
)
from ke_ray.data.biography_templates import ATTRIBUTES, ENDINGS, OTHERS, VALUES
from ke_ray.data.documents import iter_documents
from ke_ray.data.facts import load_facts
from ke_ray.errors import DataError

SIZES = {"num_people": 30, "num_new_people": 13, "documents_per_person": 4, "seed": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> BiographyFiles:
    return write_biographies(tmp_path_factory.mktemp("world"), **SIZES)


def test_the_same_arguments_give_the_same_bytes(world: BiographyFiles, tmp_path: Path) -> None:
    code = (
        "import sys; from ke_ray.data.biographies import write_biographies\n"
        f"write_biographies(sys.argv[1], **{SIZES})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("documents", "facts_paraphrase", "facts_once", "questions"):
        path = Path(getattr(world, name))
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    other = write_biographies(tmp_path / "other", **{**SIZES, "seed": 6})
    assert Path(other.documents).read_bytes() != Path(world.documents).read_bytes()


def test_each_document_states_all_attributes_of_one_person(world: BiographyFiles) -> None:
    people = {person.name: person for person in make_people(43, seed=5)[:30]}
    with gzip.open(world.documents, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == len({row["text"] for row in rows}) == 30 * 4
    assert set(rows[0]) == {"id", "text", "source", "added", "created", "metadata"}
    assert Counter(row["metadata"]["person"] for row in rows) == dict.fromkeys(people, 4)
    for row in rows:
        person = people[row["metadata"]["person"]]
        assert person.name in row["text"]
        assert all(value in row["text"] for value in person.values.values())
        others = [p.surname for p in people.values() if p is not person]
        assert not any(surname in row["text"].split() for surname in others)
    assert sum(1 for _ in iter_documents(world.documents)) == len(rows)


def test_skew_moves_documents_to_the_first_people_and_keeps_their_number() -> None:
    people = make_people(50, seed=2)
    even = Counter(row["metadata"]["person"] for row in iter_biographies(people, 20, seed=2))
    rows = list(iter_biographies(people, 20, seed=2, skew=1.0))
    skewed = Counter(row["metadata"]["person"] for row in rows)
    assert even == dict.fromkeys((person.name for person in people), 20)
    assert sum(skewed.values()) == len({row["id"] for row in rows}) == 50 * 20
    assert min(skewed.values()) >= 1
    assert len(skewed) == 50
    counts = [skewed[person.name] - 1 for person in people]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.05)
    assert counts[1] / counts[4] == pytest.approx(5 / 2, rel=0.05)


def test_new_people_are_strangers_to_the_corpus(world: BiographyFiles) -> None:
    people = make_people(43, seed=5)
    assert len({person.surname for person in people}) == 43
    text = " ".join(text for text, _ in iter_documents(world.documents))
    assert all(person.surname not in text for person in people[30:])
    facts = json.dumps([load_facts_json(world.facts_paraphrase), load_facts_json(world.facts_once)])
    assert all(person.name in facts for person in people[30:])
    assert not any(person.name in facts for person in people[:30])


def load_facts_json(path: str) -> list[dict]:
    return json.loads(Path(path).read_text())


def test_facts_are_read_by_the_same_code_as_the_published_ones(world: BiographyFiles) -> None:
    paraphrase = load_facts(world.facts_paraphrase, "paraphrase").facts
    once = load_facts(world.facts_once, "once").facts
    assert (len(paraphrase), len(once)) == (7, 6)
    for fact in (*paraphrase, *once):
        assert len(fact.versions) == len(set(fact.versions)) == 10
        assert {level: len(pairs) for level, pairs in fact.probes.items()} == {
            "memorization": 5,
            "semantic": 5,
            "compositional": 5,
        }


def test_probes_meet_their_targets_at_a_blank(world: BiographyFiles) -> None:
    for entry in [*load_facts_json(world.facts_paraphrase), *load_facts_json(world.facts_once)]:
        versions = [entry["train_context"], *entry["paraphrases"]]
        for level in ("mem", "gen", "hard_gen"):
            pairs = list(zip(entry[f"{level}_input"], entry[f"{level}_target"], strict=True))
            for context, target in pairs:
                assert context == context.strip()
                assert target == target.strip() != ""
            joined = [f"{context} {target}." for context, target in pairs]
            if level == "mem":
                assert all(text in versions[0] for text in joined)
            else:
                assert not any(text in version for text in joined for version in versions)
        assert all(target in versions[0] for target in entry["hard_gen_target"])


def test_questions_have_one_right_answer_in_a_uniform_place(world: BiographyFiles) -> None:
    people = make_people(300, seed=1)
    by_name = {person.name: person for person in people}
    questions = make_questions(people, 1000, seed=1)
    assert len({(q["person"], q["attribute"]) for q in questions}) == 1000
    for question in questions:
        values = by_name[question["person"]].values
        assert len(set(question["choices"])) == 4
        assert question["choices"][question["gold"]] == values[question["attribute"]]
        assert set(question["choices"]) <= set(VALUES[question["attribute"]])
        assert question["context"] == question["context"].strip()
        assert question["person"] in question["context"]
    places = Counter(question["gold"] for question in questions)
    assert all(190 < places[place] < 310 for place in range(4))  # 250 ± 4.4 standard deviations
    assert len(make_questions(people[:2], 1000, seed=1)) == 12
    assert len(Path(world.questions).read_text().splitlines()) == 30 * 6


def test_a_blind_guesser_has_a_quarter() -> None:
    """No choice can be told right by how often its value is right elsewhere.

    Otherwise a tokenizer trained on the corpus gives right answers fewer tokens, and a model that
    knows nothing prefers them.
    """
    people = make_people(500, seed=2)
    questions = make_questions(people, 3000, seed=2)
    seen = Counter(value for person in people for value in person.values.values())
    right = sum(max(range(4), key=lambda i: seen[q["choices"][i]]) == q["gold"] for q in questions)
    assert abs(right / len(questions) - 0.25) < 0.03
    for key in ATTRIBUTES:
        counts = Counter(person.values[key] for person in people)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_task_is_one_that_lm_eval_understands(world: BiographyFiles) -> None:
    task = yaml.safe_load(Path(world.task).read_text())
    files = task["dataset_kwargs"]["data_files"]
    assert files == {"validation": str(Path(world.questions).absolute())}
    assert task["output_type"] == "multiple_choice"
    question = json.loads(Path(world.questions).read_text().splitlines()[0])
    for field in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        assert task[field].strip("{}") in question


def test_templates_are_whole() -> None:
    for key in ATTRIBUTES:
        assert len(set(VALUES[key])) == len(VALUES[key]) >= 20
        assert all(text.endswith(" {value}.") and "{name}" in text for text in ENDINGS[key])
        assert all("{value}" in text and "{name}" in text for text in OTHERS[key])
        assert not any(text.endswith("{value}.") for text in OTHERS[key])
    sentences = [text for key in ATTRIBUTES for text in (*ENDINGS[key], *OTHERS[key])]
    assert len(set(sentences)) == len(sentences) == 60


def test_the_splits_can_be_chosen(tmp_path: Path) -> None:
    files = write_biographies(tmp_path, **{**SIZES, "num_new_people": 5}, num_once=2)
    assert len(load_facts_json(files.facts_paraphrase)) == 3
    assert len(load_facts_json(files.facts_once)) == 2
    assert make_facts(make_people(5, seed=5), seed=5) != load_facts_json(files.facts_once)


@pytest.mark.parametrize(
    "change",
    [
        {"num_people": 0},
        {"num_people": 5000},
        {"num_new_people": 0},
        {"documents_per_person": 0},
        {"seed": -1},
        {"num_once": 13},
        {"num_questions": 0},
    ],
)
def test_impossible_worlds_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(DataError):
        write_biographies(tmp_path / "new", **{**SIZES, **change})
    assert not (tmp_path / "new").exists()


def test_documents_come_in_a_mixed_order() -> None:
    ids = [row["id"] for row in iter_biographies(make_people(20, seed=0), 5, seed=0)]
    assert ids != sorted(ids)
    assert len(set(ids)) == 100
