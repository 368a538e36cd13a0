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

K, M, B, T = 10**3, 10**6, 10**9, 10**12


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # OLMo 1, 2 and 3, and the native folders.
        ("step738020-tokens3095B", CheckpointName(738020, 3_095_000_000_000)),
        ("step1000-tokens4B", CheckpointName(1000, 4_000_000_000)),
        ("step0-tokens0B", CheckpointName(0, 0)),
        ("stage1-step140000-tokens294B", CheckpointName(140000, 294_000_000_000, 1)),
        (
            "stage2-ingredient1-step23852-tokens51B",
            CheckpointName(23852, 51_000_000_000, 2, 1),
        ),
        ("stage3-step10000", CheckpointName(10000, None, 3)),
        ("stage1-step1413814-tokens5931B", CheckpointName(1_413_814, 5931 * B, 1)),
        ("stage2-ingredient3-step11931-tokens50B", CheckpointName(11_931, 50 * B, 2, 3)),
        # Pythia and DataDecide.
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
        ("epoch=0-step=100.ckpt", CheckpointName(100)),
        ("step1250-seed-default", CheckpointName(1250)),
        ("checkpoint-3-step500", CheckpointName(500)),
        # TinyLlama.
        ("step-50K-105b", CheckpointName(50 * K, 105 * B)),
        ("TinyLlama-1.1B-step-50K-105b", CheckpointName(50 * K, 105 * B)),
        ("TinyLlama-1.1B-intermediate-step-240k-503b", CheckpointName(240 * K, 503 * B)),
        ("TinyLlama-1.1B-intermediate-step-955k-token-2T", CheckpointName(955 * K, 2 * T)),
        ("TinyLlama-1.1B-intermediate-step-1195k-token-2.5T", CheckpointName(1195 * K, 2500 * B)),
        ("step-1431k-3T", CheckpointName(1431 * K, 3 * T)),
        ("step-1431k-token-3T", CheckpointName(1431 * K, 3 * T)),
        # SmolLM2 and SmolLM3.
        ("step-125000", CheckpointName(125_000)),
        ("stage2-step-3490000", CheckpointName(3_490_000, None, 2)),
        ("lc-4k-to-32k-step-4000", CheckpointName(4000)),
        # LLM360: Amber and K2 number their checkpoints.
        ("ckpt_000", CheckpointName(0)),
        ("ckpt_358", CheckpointName(358)),
        # Other abbreviations.
        ("step_20k", CheckpointName(20 * K)),
        ("step-1.5k", CheckpointName(1500)),
        ("step2.5M", CheckpointName(2_500_000)),
        ("iter_10K", CheckpointName(10 * K)),
        ("step-001000-2BT", CheckpointName(1000, 2 * B)),
        ("step1000.pt", CheckpointName(1000)),
        # Numbers that can be read in two ways are not read.
        ("step-1431x", CheckpointName()),
        ("step1.5", CheckpointName()),
        ("step1.000", CheckpointName()),
        ("step1,000", CheckpointName()),
        ("step1_000", CheckpointName()),
        ("step10_20", CheckpointName()),
        ("step1e5", CheckpointName()),
        ("step1.2345k", CheckpointName()),
        ("step1000B", CheckpointName()),
        ("step5-iter6", CheckpointName()),
        ("checkpoint-10k", CheckpointName()),
        ("ckpt_100M", CheckpointName()),
        ("chck_100M", CheckpointName()),
        ("0000020000", CheckpointName()),
        ("v1.0", CheckpointName()),
        ("step1000-7B", CheckpointName(1000)),
        ("stage1.5-step3", CheckpointName(3)),
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


@given(
    thousands=st.integers(1, 10**6),
    fraction=st.integers(0, 999),
    word=st.sampled_from(["step", "step-", "step_", "iter_", "global_step"]),
    unit=st.sampled_from("kKmM"),
)
def test_an_abbreviated_step_is_read_whole(thousands, fraction, word, unit) -> None:
    scale = K if unit in "kK" else M
    name = f"{word}{thousands}.{fraction:03d}{unit}"
    assert parse_checkpoint_name(name).step == thousands * scale + fraction * scale // 1000


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
