"""Names of checkpoints are read as published, and never raise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.checkpoints.find.names import (
    CheckpointName,
    parse_checkpoint_name,
    parse_step_and_tokens,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step738020-tokens3095B", CheckpointName(738020, 3_095_000_000_000)),
        ("step1000-tokens4B", CheckpointName(1000, 4_000_000_000)),
        ("step0-tokens0B", CheckpointName(0, 0)),
        ("stage1-step140000-tokens294B", CheckpointName(140000, 294_000_000_000, 1)),
        (
            "stage2-ingredient1-step23852-tokens51B",
            CheckpointName(23852, 51_000_000_000, 2, 1),
        ),
        ("stage3-step10000", CheckpointName(10000, None, 3)),
        ("step0", CheckpointName(0)),
        ("step512", CheckpointName(512)),
        ("step143000", CheckpointName(143000)),
        ("step1000-unsharded", CheckpointName(1000)),
        ("checkpoint-500", CheckpointName(500)),
        ("global_step500", CheckpointName(500)),
        ("global-step-500", CheckpointName(500)),
        ("iter_7", CheckpointName(7)),
        ("iter_0001000", CheckpointName(1000)),
        ("STEP_12", CheckpointName(12)),
        ("epoch=0-step=100", CheckpointName(100)),
        ("step5-tokens1.5T", CheckpointName(5, 1_500_000_000_000)),
        ("main", CheckpointName()),
        ("timestep5", CheckpointName()),
        ("one-step-beyond", CheckpointName()),
        ("", CheckpointName()),
        ("https://host/olmo-medium/wvc30anm/step5000-unsharded/", CheckpointName(5000)),
        (
            "https://host/olmo-7b_stage2_ingredient3/step9000-unsharded/",
            CheckpointName(9000, None, 2, 3),
        ),
        ("step9/notes", CheckpointName()),
    ],
)
def test_published_names(name: str, expected: CheckpointName) -> None:
    assert parse_checkpoint_name(name) == expected


@given(st.text(max_size=200))
def test_any_text_is_parsed_without_raising(name: str) -> None:
    parsed = parse_checkpoint_name(name)
    assert all(part is None or part >= 0 for part in (parsed.step, parsed.tokens, parsed.stage))


@given(
    st.lists(
        st.sampled_from(
            [
                "step",
                "tokens",
                "stage",
                "ingredient",
                "iter_",
                "checkpoint-",
                "-",
                "_",
                "B",
                ".",
                "/",
            ]
        )
        | st.integers(0, 10**40).map(str)
        | st.sampled_from(["٣", "²", "\0", "𝟛"]),
        max_size=12,
    ).map("".join)
)
def test_near_misses_are_parsed_without_raising(name: str) -> None:
    parse_checkpoint_name(name)


@given(
    step=st.integers(0, 10**9),
    billions=st.integers(0, 10**6),
    stage=st.none() | st.integers(1, 9),
)
def test_what_is_written_is_read_back(step: int, billions: int, stage: int | None) -> None:
    prefix = f"stage{stage}-" if stage else ""
    name = f"{prefix}step{step}-tokens{billions}B"
    assert parse_step_and_tokens(name) == (step, billions * 10**9)
    assert parse_checkpoint_name(name).stage == stage
