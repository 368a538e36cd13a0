"""Tokens over all stages, and the holes of series that are regular otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from ke_ray.checkpoints.find.catalog import find_checkpoints
from ke_ray.checkpoints.find.names import parse_checkpoint_name
from ke_ray.checkpoints.find.progress import missing_checkpoints, with_tokens
from ke_ray.checkpoints.reference import CheckpointRef, order_key, with_name

B = 10**9


def named(*names: str) -> list[CheckpointRef]:
    return [with_name(CheckpointRef(n, n, "hf"), parse_checkpoint_name(n)) for n in names]


def tokens(refs: list[CheckpointRef], tokens_per_step: int | None = None) -> list[int | None]:
    return [ref.tokens for ref in with_tokens(refs, tokens_per_step)]


def test_tokens_of_a_later_stage_follow_on_from_the_one_before() -> None:
    refs = named(
        "stage2-ingredient1-step1000-tokens5B",
        "stage1-step928646-tokens3896B",
        "stage2-ingredient2-step11931-tokens50B",
        "step150-tokens1B",  # of stage 1, without its name
        "stage3-step500-tokens2B",
    )
    assert tokens(refs) == [3901 * B, 3896 * B, 3946 * B, 1 * B, 3948 * B]


def test_tokens_that_go_on_counting_stay_as_they_are() -> None:
    names = ("step-0850000_tokens-1782B-phase1", "step-0859000_tokens-1803B-phase2")
    assert tokens(named(*names)) == [1782 * B, 1803 * B]


def test_a_stage_that_branches_off_before_the_end_and_counts_on_is_not_doubled() -> None:
    names = ("stage1-step100-tokens1B", "stage1-step1000-tokens10B", "stage2-step900-tokens9B")
    assert tokens(named(*names)) == [1 * B, 10 * B, 9 * B]


def test_steps_become_tokens_by_the_batch_and_names_take_precedence() -> None:
    refs = named("pretrain_iter_0300000", "anneal_iter_0001000", "step10-tokens1B")
    assert tokens(refs, 4_194_304)[:2] == [300_000 * 4_194_304, 301_000 * 4_194_304]
    assert tokens(refs, 4_194_304)[2] == 1 * B
    assert tokens(refs)[:2] == [None, None]


def test_seeds_are_counted_apart() -> None:
    refs = named("stage1-step100-seed-a", "stage2-step1-seed-a", "stage2-step1-seed-b")
    assert tokens(refs, 10) == [1000, 1010, 10]


def test_the_holes_of_the_published_lists_are_said(reference_data: Path) -> None:
    folder = reference_data / "data" / "olmo_checkpoints"
    (note,) = find_checkpoints(str(folder / "OLMo-1B.csv"), limit=2).notes
    assert "117,850 to 330,000 (211)" in note
    assert "Most checkpoints are 1,000 steps apart, but 404 are missing: 48 holes" in note
    note = find_checkpoints(str(folder / "OLMo-7B.csv")).notes[0]
    assert "41 are missing: 5,000 to 40,000 (34); 492,000 to 500,000 (7)." in note
    assert find_checkpoints(str(folder / "OLMo-1B.csv"), steps="95000:106000").notes == ()


@pytest.mark.parametrize(
    "steps",
    [
        [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)],  # Pythia
        [  # B-GPT
            *range(0, 50_001, 10_000),
            *range(64_000, 64_200, 10),
            *range(64_200, 65_000, 100),
            *range(65_000, 70_001, 1000),
            *range(80_000, 120_001, 10_000),
            128_000,
        ],
        [10, 20, 30, 70],
    ],
)
def test_series_that_are_regular_or_have_no_rule_have_no_holes(steps: list[int]) -> None:
    assert missing_checkpoints(named(*(f"step{step}" for step in steps))) == []


def test_a_hole_is_named_with_its_stage_and_seed() -> None:
    whole = [f"stage1-step{step}" for step in range(0, 100, 10)]
    holed = [f"stage2-step{step}-seed-b" for step in range(0, 100, 10) if step != 50]
    (note,) = missing_checkpoints(sorted(named(*whole, *holed), key=order_key))
    expected = "Most checkpoints of seed b, stage2 are 10 steps apart, but 1 are missing: 40 to 60"
    assert note.startswith(expected)
