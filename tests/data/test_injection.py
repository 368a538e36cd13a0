"""What enters the batch equals the published rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ke_ray.data.facts import load_facts, parse_facts
from ke_ray.data.injection import injection_records, plan_injections
from ke_ray.data.injection_schedule import (
    Schedule,
    ScheduledText,
    load_schedule,
    schedule_from_facts,
)
from ke_ray.errors import DataError

EOS = 50279


def make_schedule(
    num_injections: int = 2, num_texts: int = 3, length: int = 4, *, spread: bool = True
) -> Schedule:
    """Texts whose ids tell injection and row: 1000·k + 100·r + position."""
    return Schedule(
        tuple(
            ScheduledText(
                k, r, "paraphrase", r, k - 1,
                token_ids=tuple(1000 * k + 100 * r + i for i in range(length)),
            )
            for k in range(1, num_injections + 1)
            for r in range(num_texts)
        ),
        spread=spread,
    )  # fmt: skip


def batch(rows: int, length: int) -> np.ndarray:
    return np.arange(rows * length, dtype=np.int64).reshape(rows, length)


@pytest.fixture(scope="module")
def folder(reference_data: Path) -> Path:
    return reference_data / "data"


@pytest.fixture(scope="module")
def paper_schedule(folder: Path) -> Schedule:
    return schedule_from_facts(
        [
            load_facts(folder / "fictional_knowledge" / "once60.json", "once"),
            load_facts(folder / "fictional_knowledge" / "paraphrase70.json", "paraphrase"),
        ]
    )


def test_the_papers_schedule_equals_the_published_table_row_by_row(
    folder: Path, paper_schedule: Schedule
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "olmo_hf_tokenizer.json"))
    published = load_schedule(folder / "fictional_knowledge" / "injection_schedule.parquet")
    assert len(paper_schedule.rows) == len(published.rows) == 760
    for mine, theirs in zip(paper_schedule.rows, published.rows, strict=True):
        assert mine.text is not None
        ids = (*tokenizer.encode(mine.text, add_special_tokens=False).ids, EOS)
        assert (mine.injection, mine.row, mine.setting, mine.instance, mine.version, ids) == (
            theirs.injection, theirs.row, theirs.setting, theirs.instance, theirs.version,
            theirs.token_ids,
        )  # fmt: skip


def test_the_papers_run_injects_the_table_at_multiples_of_160(
    folder: Path, paper_schedule: Schedule
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "olmo_hf_tokenizer.json"))
    published = load_schedule(folder / "fictional_knowledge" / "injection_schedule.parquet")
    plan = plan_injections(
        paper_schedule, num_steps=1600, global_batch=128, sequence_length=1024,
        tokenizer=tokenizer, eos_token_id=EOS,
    )  # fmt: skip
    assert plan.injection_steps() == tuple(range(160, 1601, 160))
    rows = np.full((128, 1024), 7)
    for k in range(1, 11):
        changed = plan.inject(rows, 160 * k)
        texts = published.at(k)
        for text in texts:
            assert text.token_ids is not None
            expected = [*text.token_ids, *[7] * 1024][:1024]
            assert changed[text.row].tolist() == expected
        assert (changed[len(texts) :] == 7).all()
    assert (rows == 7).all()


def test_a_batch_of_2048_gives_an_interval_of_ten_steps(paper_schedule: Schedule) -> None:
    from ke_ray.data.injection import _events

    assert sorted(_events(paper_schedule, 100, 1, None)) == list(range(10, 101, 10))


def test_later_epochs_repeat_the_injections_in_order() -> None:
    plan = plan_injections(
        make_schedule(), num_steps=12, epochs=3, global_batch=128, sequence_length=8
    )
    assert plan.injection_steps() == (2, 4, 6, 8, 10, 12)
    assert [plan.events[step] for step in plan.injection_steps()] == [1, 2, 1, 2, 1, 2]
    first, third = (plan.inject(batch(128, 8), step) for step in (2, 6))
    assert (first == third).all()


def test_next_injection_looks_ahead_only() -> None:
    plan = plan_injections(make_schedule(), num_steps=10, global_batch=128, sequence_length=8)
    assert [plan.next_injection(step) for step in (0, 4, 5, 9, 10)] == [5, 5, 10, 10, None]


@pytest.mark.parametrize(("global_batch", "sizes"), [(1, [7]), (2, [4, 3]), (3, [3, 2, 2]),
                                                     (7, [1] * 7), (9, [1] * 7)])  # fmt: skip
def test_small_batches_divide_the_texts_in_order(global_batch: int, sizes: list[int]) -> None:
    schedule = make_schedule(num_injections=1, num_texts=7, length=2)
    plan = plan_injections(schedule, num_steps=1, global_batch=global_batch, sequence_length=20)
    changed = plan.inject(np.full((global_batch, 20), 7), 1)
    texts = [list(row.token_ids or ()) for row in schedule.rows]
    expected, start = [], 0
    for size in sizes:
        ids = [token for text in texts[start : start + size] for token in text]
        expected.append([*ids, *[7] * 20][:20])
        start += size
    assert changed.tolist()[: len(sizes)] == expected
    assert (changed[len(sizes) :] == 7).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_any_split_of_the_batch_gives_the_same_rows(kind: str) -> None:
    plan = plan_injections(
        make_schedule(num_injections=1, num_texts=5), num_steps=3, interval=3,
        global_batch=4, sequence_length=16,
    )  # fmt: skip
    rows = batch(4, 16) if kind == "numpy" else torch.from_numpy(batch(4, 16))
    whole = plan.inject(rows, 3)
    for indices in ([0, 1], [2, 3], [1, 3], [3], [2, 0]):
        part = plan.inject(rows[indices], 3, indices)
        assert type(part) is type(rows)
        assert part.dtype == rows.dtype
        assert (part == whole[indices]).all()
    assert plan.inject(rows, 2) is rows
    assert rows.tolist() == batch(4, 16).tolist()
    assert whole.tolist() != rows.tolist()


def test_prepending_shifts_the_row_and_cuts_it() -> None:
    plan = plan_injections(make_schedule(1, 1, 3), num_steps=1, global_batch=128, sequence_length=5)
    changed = plan.inject(batch(128, 5), 1)
    assert changed[0].tolist() == [1000, 1001, 1002, 0, 1]
    assert (changed[1:] == batch(128, 5)[1:]).all()


def test_records_tell_what_entered() -> None:
    plan = plan_injections(make_schedule(), num_steps=2, global_batch=2, sequence_length=8)
    assert injection_records(plan, 2) == [
        {
            "step": 2,
            "row": row,
            "setting": "paraphrase",
            "instance": instance,
            "version": 1,
            "num_tokens": 4,
        }
        for row, instance in ((0, 0), (0, 1), (1, 2))
    ]


@pytest.mark.parametrize(
    ("schedule", "changes", "message"),
    [
        (make_schedule(spread=False), {"global_batch": 2}, "row 2.*beyond the batch of 2 rows"),
        (make_schedule(), {"num_steps": 1}, "2 injections do not fit into 1 steps"),
        (make_schedule(), {"interval": 9}, "falls on step 18 .*the run has 10 steps"),
        (make_schedule(), {"interval": 0}, "at least 1"),
        (make_schedule(), {"global_batch": 1}, "12 injected tokens into row 0, but a row has 8"),
        (make_schedule(length=9), {}, "9 injected tokens into row 0, but a row has 8"),
        (Schedule(make_schedule().rows, {1: 4, 2: 11}), {}, "row at step 11, but an epoch has 10"),
        (Schedule((ScheduledText(1, 0, "once", 3, 0),)), {}, "neither text nor token ids"),
        (Schedule((ScheduledText(1, 0, "once", 3, 0, "A."),)), {}, "a tokenizer .* needed"),
    ],
)
def test_bad_input_is_one_clear_message(
    schedule: Schedule, changes: dict[str, int], message: str
) -> None:
    settings = {"num_steps": 10, "global_batch": 128, "sequence_length": 8} | changes
    with pytest.raises(DataError, match=message) as caught:
        plan_injections(schedule, **settings)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_embedding_are_refused() -> None:
    plan = plan_injections(make_schedule(), num_steps=2, global_batch=128, sequence_length=8)
    plan.check_vocabulary(3000)
    with pytest.raises(DataError, match="the model has 2000 embeddings"):
        plan.check_vocabulary(2000)


def test_the_rule_groups_once_facts_and_cycles_versions() -> None:
    entry = {"train_context": "T0", "mem_input": ["a"], "mem_target": ["b"]}
    once = parse_facts([entry] * 5, "once")
    para = parse_facts([entry | {"paraphrases": ["T1"]}, entry | {"paraphrases": ["U1", "U2"]}],
                       "paraphrase")  # fmt: skip
    schedule = schedule_from_facts([once, para])
    assert schedule.num_injections == 3
    assert [
        [(row.row, row.setting, row.instance, row.version) for row in schedule.at(k)]
        for k in (1, 2, 3)
    ] == [
        [(0, "paraphrase", 0, 0), (1, "paraphrase", 1, 0), (2, "once", 0, 0), (3, "once", 1, 0)],
        [(0, "paraphrase", 0, 1), (1, "paraphrase", 1, 1), (2, "once", 2, 0), (3, "once", 3, 0)],
        [(0, "paraphrase", 0, 0), (1, "paraphrase", 1, 2), (2, "once", 4, 0)],
    ]


@pytest.mark.parametrize(("key", "steps"), [("injection", None), ("step", {1: 5, 2: 9})])
def test_json_and_yaml_hold_the_same_schedule(
    tmp_path: Path, key: str, steps: dict[int, int] | None
) -> None:
    first, second = (steps[1], steps[2]) if steps else (1, 2)
    value = {
        "spread": True,
        "rows": [
            {key: second, "row": 3, "setting": "paraphrase", "instance": 5, "version": 2},
            {key: first, "row": 0, "setting": "once", "instance": 0, "version": 0,
             "text": "Größe: “yes”\n# no"},
            {key: second, "row": 1, "setting": "paraphrase", "instance": 4, "version": 2,
             "token_ids": [1, 2, 3]},
        ],
    }  # fmt: skip
    (tmp_path / "schedule.json").write_text(json.dumps(value))
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(value, allow_unicode=True))
    expected = Schedule(
        (
            ScheduledText(1, 0, "once", 0, 0, text="Größe: “yes”\n# no"),
            ScheduledText(2, 1, "paraphrase", 4, 2, token_ids=(1, 2, 3)),
            ScheduledText(2, 3, "paraphrase", 5, 2),
        ),
        steps,
        spread=True,
    )
    assert load_schedule(tmp_path / "schedule.json") == expected
    assert load_schedule(tmp_path / "schedule.yaml") == expected
