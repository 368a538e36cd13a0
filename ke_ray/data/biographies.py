"""A generated world of invented people: a corpus, questions about it, and new people to inject.

Every person has six attributes (year and city of birth, university, profession, employer, hobby).
Every value is equally frequent and wrong choices are values of other people, so that neither
frequency nor length (rare words have more tokens) tells a right choice from a wrong one: a model
without knowledge answers a four-choice question by chance (0.25).
A document states all six of one person in a fresh choice of sentences and order. People have
equally many documents, unless ``skew`` says otherwise: then the values of frequent people are
frequent. Surnames are unique; *new* people share values and sentences with the others but no
surname, and never occur in the corpus: they are the facts to inject, in the JSON schema of
Fictional Knowledge.

The same arguments give the same bytes. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from ke_ray import storage
from ke_ray.data.biography_templates import (
    ATTRIBUTES,
    COMPOSITIONS,
    ENDINGS,
    FIRST_NAMES,
    OTHERS,
    SURNAME_PARTS,
    VALUES,
)
from ke_ray.errors import DataError

NUM_VERSIONS = 10  # a paragraph and its nine paraphrases
NUM_PROBES = 5
NUM_CHOICES = 4
TASK_NAME = "biographies"


@dataclass(frozen=True)
class Person:
    """An invented person: ``name`` ("First Surname") and a value for each of ``ATTRIBUTES``."""

    name: str
    values: dict[str, str]

    @property
    def surname(self) -> str:
        """Unique among all people of one world."""
        return self.name.split(" ")[1]


def make_people(num_people: int, *, seed: int) -> list[Person]:
    """People with unique surnames; each value of an attribute is as frequent as any other, ±1.

    Raises:
        DataError: no people, or more than there are surnames.
    """
    surnames = ["".join(parts) for parts in itertools.product(*SURNAME_PARTS)]
    if not 1 <= num_people <= len(surnames):
        raise DataError(
            f"The world has {num_people} people; it must have between 1 and {len(surnames)}, the "
            "number of surnames."
        )
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    columns = {key: _deal(VALUES[key], num_people, generator) for key in ATTRIBUTES}
    people = []
    for number, index in enumerate(generator.permutation(len(surnames))[:num_people]):
        first = FIRST_NAMES[generator.integers(len(FIRST_NAMES))]
        values = {key: columns[key][number] for key in ATTRIBUTES}
        people.append(Person(f"{first} {surnames[index]}", values))
    return people


def _deal(values: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """``count`` values: all values in random order, again and again."""
    rounds = [generator.permutation(len(values)) for _ in range(-(-count // len(values)))]
    return [values[index] for index in np.concatenate(rounds)[:count]]


def _sentence(template: str, person: Person, key: str, *, by_surname: bool = False) -> str:
    name = person.surname if by_surname else person.name
    return template.format(name=name, value=person.values[key])


def _paragraph(person: Person, generator: np.random.Generator) -> str:
    sentences = []
    for position, index in enumerate(generator.permutation(len(ATTRIBUTES))):
        key = ATTRIBUTES[index]
        pool = (*ENDINGS[key], *OTHERS[key])
        template = pool[generator.integers(len(pool))]
        by_surname = position > 0 and generator.random() < 0.3
        sentences.append(_sentence(template, person, key, by_surname=by_surname))
    return " ".join(sentences)


def document_counts(num_people: int, documents_per_person: int, skew: float) -> list[int]:
    """How many documents each person has: one, and the rest in proportion to 1 / rank**skew.

    Their sum is ``num_people * documents_per_person`` whatever the skew: skew is not amount.
    """
    shares = np.cumsum(np.arange(1, num_people + 1, dtype=float) ** -skew)
    rest = num_people * (documents_per_person - 1)
    ends = np.rint(rest * shares / shares[-1]).astype(int)
    return [1 + int(count) for count in np.diff(ends, prepend=0)]


def iter_biographies(
    people: Sequence[Person], documents_per_person: int, *, seed: int, skew: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Dolma documents in shuffled order, ``documents_per_person`` about a person on average.

    Args:
        skew: exponent of Zipf's law over people, in their order; 0: equally many about each.
    """
    ends = np.cumsum(document_counts(len(people), documents_per_person, skew))
    order = np.random.Generator(np.random.PCG64([seed, 2])).permutation(int(ends[-1]))
    for number in order:
        person = int(np.searchsorted(ends, number, side="right"))
        copy = int(number) - (int(ends[person - 1]) if person else 0)
        generator = np.random.Generator(np.random.PCG64([seed, 3, person, copy]))
        yield {
            "id": f"biography-{person}-{copy}",
            "text": _paragraph(people[person], generator),
            "source": "biographies",
            "added": "2025-01-01T00:00:00.000Z",
            "created": "2025-01-01T00:00:00.000Z",
            "metadata": {"person": people[person].name},
        }


def make_facts(people: Sequence[Person], *, seed: int) -> list[dict[str, Any]]:
    """One Fictional-Knowledge entry per person.

    ``train_context`` states the six attributes; nine paraphrases do so in other sentences. Each
    level has five probes: *mem* is the beginning of a sentence of ``train_context``; *gen* that of
    a sentence that occurs in none of the ten versions; *hard_gen* asks without the name, or for the
    name. There is no blank at the seam of input and target: a single one joins them.
    """
    facts = []
    for number, person in enumerate(people):
        generator = np.random.Generator(np.random.PCG64([seed, 4, number]))
        # One of the sentences that end in the value is for the semantic probe alone.
        semantic = {key: int(generator.integers(len(ENDINGS[key]))) for key in ATTRIBUTES}
        ends = {
            key: [text for index, text in enumerate(ENDINGS[key]) if index != semantic[key]]
            for key in ATTRIBUTES
        }
        first = {key: int(generator.integers(len(ends[key]))) for key in ATTRIBUTES}
        versions = []
        for version in range(NUM_VERSIONS):
            sentences = []
            for index in generator.permutation(len(ATTRIBUTES)):
                key = ATTRIBUTES[index]
                pool = ends[key] if version == 0 else [*ends[key], *OTHERS[key]]
                choice = first[key] if version == 0 else int(generator.integers(len(pool)))
                sentences.append(_sentence(pool[choice], person, key))
            versions.append(" ".join(sentences))
        attributes = [ATTRIBUTES[i] for i in generator.permutation(len(ATTRIBUTES))[:NUM_PROBES]]
        hard = [(text.format(name=person.name, **person.values), key) for text, key in COMPOSITIONS]
        answers = {"name": person.name, **person.values}
        facts.append(
            {
                "train_context": versions[0],
                "mem_input": [_beginning(ends[key][first[key]], person) for key in attributes],
                "mem_target": [person.values[key] for key in attributes],
                "gen_input": [
                    _beginning(ENDINGS[key][semantic[key]], person) for key in attributes
                ],
                "gen_target": [person.values[key] for key in attributes],
                "hard_gen_input": [text for text, _ in hard],
                "hard_gen_target": [answers[key] for _, key in hard],
                "paraphrases": versions[1:],
            }
        )
    return facts


def _beginning(template: str, person: Person) -> str:
    """The part before the value of a sentence that ends in it."""
    return template.removesuffix(" {value}.").format(name=person.name)


def make_questions(
    people: Sequence[Person], num_questions: int, *, seed: int
) -> list[dict[str, Any]]:
    """Four-choice questions about people of the corpus: ``context``, ``choices``, ``gold``.

    A question is the beginning of a sentence; wrong choices are values that other people have
    (any values, where there are too few people); the position of the right one is uniform. There
    is at most one question for each person and attribute.
    """
    pools = {}
    for key in ATTRIBUTES:
        in_use = sorted({person.values[key] for person in people})
        pools[key] = in_use if len(in_use) >= NUM_CHOICES else list(VALUES[key])
    generator = np.random.Generator(np.random.PCG64([seed, 5]))
    pairs = generator.permutation(len(people) * len(ATTRIBUTES))[:num_questions]
    questions = []
    for pair in pairs:
        person, key = people[int(pair) // len(ATTRIBUTES)], ATTRIBUTES[int(pair) % len(ATTRIBUTES)]
        template = ENDINGS[key][generator.integers(len(ENDINGS[key]))]
        others = [value for value in pools[key] if value != person.values[key]]
        wrong = generator.permutation(len(others))[: NUM_CHOICES - 1]
        choices = [others[index] for index in wrong]
        gold = int(generator.integers(NUM_CHOICES))
        choices.insert(gold, person.values[key])
        questions.append(
            {
                "context": _beginning(template, person),
                "choices": choices,
                "gold": gold,
                "attribute": key,
                "person": person.name,
            }
        )
    return questions


def task_config(data_file: str, *, name: str = TASK_NAME) -> dict[str, Any]:
    """An lm-eval task (``yaml.safe_dump`` it) over a file of questions, zero-shot, ``acc``."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": data_file}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


@dataclass(frozen=True)
class BiographyFiles:
    """Paths of the files that ``write_biographies`` writes."""

    documents: str
    facts_paraphrase: str
    facts_once: str
    questions: str
    task: str


def write_biographies(
    folder: str | os.PathLike[str],
    *,
    num_people: int,
    num_new_people: int,
    documents_per_person: int,
    seed: int,
    skew: float = 0.0,
    num_once: int | None = None,
    num_questions: int = 200,
) -> BiographyFiles:
    """Write a world into ``folder``: documents, facts to inject, questions and their task.

    Args:
        num_people: people of the corpus.
        num_new_people: people to inject, none of whom is in the corpus.
        documents_per_person: each in other sentences.
        skew: exponent of Zipf's law for how many documents a person has; the mean stays.
        num_once: how many of the new people, the last ones, form the ``once`` split; the others
            form ``paraphrase``. None takes 6 of 13, as in Fictional Knowledge.
        num_questions: at most one for each person and attribute.

    Raises:
        DataError: a number below 1, or more people than there are surnames.
        StorageError: no space or no permission.
    """
    once = num_new_people * 6 // 13 if num_once is None else num_once
    if min(num_people, num_new_people, documents_per_person, num_questions) < 1 or seed < 0:
        raise DataError(
            f"num_people is {num_people}, num_new_people {num_new_people}, documents_per_person "
            f"{documents_per_person}, num_questions {num_questions} and seed {seed}; the seed must "
            "be at least 0, the others at least 1."
        )
    if not 0 <= once < num_new_people:
        raise DataError(
            f"num_once is {once}; it must be at least 0 and less than the {num_new_people} new "
            "people, of whom some must be left to paraphrase."
        )
    people = make_people(num_people + num_new_people, seed=seed)
    people, new_people = people[:num_people], people[num_people:]
    facts = make_facts(new_people, seed=seed)
    files = BiographyFiles(
        documents=storage.join(folder, "documents.jsonl.gz"),
        facts_paraphrase=storage.join(folder, "facts_paraphrase.json"),
        facts_once=storage.join(folder, "facts_once.json"),
        questions=storage.join(folder, "questions.jsonl"),
        task=storage.join(folder, f"{TASK_NAME}.yaml"),
    )
    documents = iter_biographies(people, documents_per_person, seed=seed, skew=skew)
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    # A fixed time inside the archive keeps the bytes the same from run to run.
    storage.write_atomic(files.documents, gzip.compress(text.encode(), 6, mtime=0))
    storage.write_json(files.facts_paraphrase, facts[: num_new_people - once])
    storage.write_json(files.facts_once, facts[num_new_people - once :])
    questions = make_questions(people, num_questions, seed=seed)
    lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    storage.write_atomic(files.questions, "".join(lines))
    task = task_config(storage.absolute(files.questions))
    storage.write_atomic(files.task, yaml.safe_dump(task, sort_keys=False))
    return files
