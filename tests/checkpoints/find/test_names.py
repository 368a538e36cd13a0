"""Names of checkpoints are read as published, and never raise."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.checkpoints.find.names import (
    CheckpointName,
    parse_checkpoint_name,
    step_pattern,
)
from ke_ray.core.position import stage_key
from ke_ray.errors import CheckpointSpecError

K, M, B, T = 10**3, 10**6, 10**9, 10**12


def at(step: int | None = None, tokens: int | None = None, **others) -> CheckpointName:
    return CheckpointName(step, tokens, **others)


def stage(number: int, *position: int | None, label: str | None = None, **others) -> CheckpointName:
    return at(*position, stage=number, stage_label=label or f"stage{number}", **others)


#: Where names are published → names there, and what they say. "(unconfirmed)": the convention is
#: known, but no stored page shows these very names.
PUBLISHED: dict[str, dict[str, CheckpointName]] = {
    "allenai/OLMo-1B-hf": {
        "step738020-tokens3095B": at(738_020, 3095 * B),
        "step20000-tokens84B": at(20_000, 84 * B),
        "step117850-tokens494B": at(117_850, 494 * B),
        "step330000-tokens1384B": at(330_000, 1384 * B),
        "step337700-tokens1416B": at(337_700, 1416 * B),
    },
    "allenai/OLMo-7B, allenai/OLMo-7B-Twin-2T (revisions.txt)": {
        "step0-tokens0B": at(0, 0),
        "step1000-tokens4B": at(1000, 4 * B),
        "step33600-tokens141B": at(33_600, 141 * B),
        "step556000-tokens2460B": at(556_000, 2460 * B),
    },
    "allenai/OLMo-1B-0724-hf": {
        "step1000-tokens2B": at(1000, 2 * B),
    },
    "olmo-checkpoints.org (OLMo-1B.csv, OLMo-7B.csv)": {
        "https://olmo-checkpoints.org/ai2-llm/olmo-small/w1r5xfzt/step1000-unsharded/": at(1000),
        "https://olmo-checkpoints.org/ai2-llm/olmo-medium/wvc30anm/step5000-unsharded/": at(5000),
        "olmo-medium/p067ktg9/step558223-unsharded": at(558_223),
        "https://host/olmo-7b_stage2_ingredient3/step9000-unsharded/": stage(
            2, 9000, branch="ingredient3"
        ),
    },
    "allenai/OLMo-2-0425-1B, allenai/OLMo-2-0425-1B-early-training": {
        "stage1-step0-tokens0B": stage(1, 0, 0),
        "stage1-step300-tokens1B": stage(1, 300, 1 * B),
        "stage1-step140000-tokens294B": stage(1, 140_000, 294 * B),
        "stage1-step1907359-tokens4001B": stage(1, 1_907_359, 4001 * B),
        "stage2-ingredient1-step23852-tokens51B": stage(2, 23_852, 51 * B, branch="ingredient1"),
        "stage2-ingredient3-step6000-tokens13B": stage(2, 6000, 13 * B, branch="ingredient3"),
    },
    "allenai/OLMo-2-1124-7B, -13B, allenai/OLMo-2-0325-32B": {
        "step150-tokens1B": at(150, 1 * B),
        "step2150-tokens10B": at(2150, 10 * B),
        "stage1-step928646-tokens3896B": stage(1, 928_646, 3896 * B),
        "stage2-ingredient1-step11931-tokens50B": stage(2, 11_931, 50 * B, branch="ingredient1"),
        "stage2-ingredient4-step9000-tokens76B": stage(2, 9000, 76 * B, branch="ingredient4"),
    },
    "allenai/Olmo-3-1025-7B": {
        "stage1-step0": stage(1, 0),
        "stage1-step1413814": stage(1, 1_413_814),
        "stage2-step47684": stage(2, 47_684),
        "stage3-step11921": stage(3, 11_921),
    },
    "allenai/Olmo-3-1125-32B": {
        "stage1-step656000": stage(1, 656_000),
        "stage2-ingredient1+2-step23842": stage(2, 23_842, branch="ingredient1+2"),
        "stage3-step1000": stage(3, 1000),
    },
    "allenai/OLMoE-1B-7B-0924": {
        "step5000-tokens20B": at(5000, 20 * B),
        "step1200000-tokens5033B": at(1_200_000, 5033 * B),
        "step1220000-tokens5117B": at(1_220_000, 5117 * B),
    },
    "allenai/DataDecide-dolma1_7-1B, …-60M": {
        "step0-seed-default": at(0, seed="default"),
        "step1250-seed-default": at(1250, seed="default"),
        "step69369-seed-default": at(69_369, seed="default"),
        "step69369-seed-large-aux-2": at(69_369, seed="large-aux-2"),
        "step5000-seed-small-aux-2": at(5000, seed="small-aux-2"),
        "step6250-seed-small-aux-3": at(6250, seed="small-aux-3"),
    },
    "EleutherAI/pythia-1b": {
        "step0": at(0),
        "step1": at(1),
        "step512": at(512),
        "step1000": at(1000),
        "step143000": at(143_000),
    },
    "EleutherAI/pythia-160m-seed3, …-data-seed1, …-weight-seed2": {
        "EleutherAI/pythia-160m-seed3/step1000": at(1000, seed="3"),
        "EleutherAI/pythia-160m-data-seed1/step0": at(0, seed="data-1"),
        "EleutherAI/pythia-160m-weight-seed2/step512": at(512, seed="weight-2"),
        "EleutherAI/pythia-14m-seed9": at(seed="9"),
    },
    "HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints, …-360M-…, …-135M-…": {
        "step-125000": at(125_000),
        "step-5125000": at(5_125_000),
        "step-160000": at(160_000),
        "step-240000": at(240_000),
    },
    "HuggingFaceTB/SmolLM3-3B-checkpoints": {
        "stage1-step-40000": stage(1, 40_000),
        "stage1-step-3440000": stage(1, 3_440_000),
        "stage2-step-3480000": stage(2, 3_480_000),
        "stage2-step-4200000": stage(2, 4_200_000),
        "stage3-step-4720000": stage(3, 4_720_000),
        "lc-4k-to-32k-step-4000": at(4000, stage_label="lc-4k-to-32k"),
        "lc-32k-to-64k-step-20000": at(20_000, stage_label="lc-32k-to-64k"),
        "it-mid-training": at(stage_label="it-mid-training"),
        "it-SFT": at(stage_label="it-SFT"),
        "it-soup-APO": at(stage_label="it-soup-APO"),
        "it-LC-expert": at(stage_label="it-LC-expert"),
    },
    "swiss-ai/Apertus-8B-2509, swiss-ai/Apertus-70B-2509": {
        "step50000-tokens210B": at(50_000, 210 * B),
        "step1194000-tokens5014B": at(1_194_000, 5014 * B),
        "step2600000-tokens14792B": at(2_600_000, 14_792 * B),
        "step2627139-tokens15T": at(2_627_139, 15 * T),
        "step1155828-tokens15T": at(1_155_828, 15 * T),
        "longctx-step50": at(50, stage_label="longctx"),
        "longctx-step1000": at(1000, stage_label="longctx"),
    },
    "LLM360/Amber": {
        "ckpt_000": at(0),
        "ckpt_001": at(1),
        "ckpt_358": at(358),
        "main": at(),
    },
    "LLM360/CrystalCoder": {
        "CrystalCoder_phase1_checkpoint_055500": stage(1, 55_500, label="phase1"),
        "CrystalCoder_phase2_checkpoint_214387": stage(2, 214_387, label="phase2"),
        "CrystalCoder_phase3_checkpoint_027728": stage(3, 27_728, label="phase3"),
    },
    "dhgottesman/LMEnt-1B-1E, …-2E, …-170M-1E (subfolders)": {
        "step10000": at(10_000),
        "dhgottesman/LMEnt-1B-1E/step109672": at(109_672),
        "dhgottesman/LMEnt-1B-2E/step219344": at(219_344),
    },
    "BabyLM-community/babylm-baseline-100m-gpt2": {
        "chck_1M": at(words=1 * M),
        "chck_10M": at(words=10 * M),
        "chck_100M": at(words=100 * M),
        "chck_1000M": at(words=1000 * M),
    },
    "catherinearnett/B-GPT_en_nl_simultaneous": {
        "0": at(0),
        "10000": at(10_000),
        "64010": at(64_010),
        "128000": at(128_000),
    },
    "common-pile/comma-v0.1 (unconfirmed; ten digits as lingua writes them)": {
        "0000020000": at(20_000),
        "0000460000": at(460_000),
    },
    "marin-community/marin-8b-base": {
        "kestrel": at(),
        "ocelot": at(),
        "jellyfish": at(),
        "phoenix": at(),
        "starling": at(),
        "deeper-starling": at(),
    },
    "gs://marin-us-central1/checkpoints/tootsie-8b-deeper-starling/hf": {
        "tootsie-8b-deeper-starling/hf/step-1419999": at(1_419_999),
    },
    "pico-lm/pico-decoder-tiny (commits of one branch; folders of pico-train)": {
        "checkpoints/step_0": at(0),
        "pico-decoder-tiny-dolma250M-v1/checkpoints/step_100000": at(100_000),
        "Saving HF Model -- Step 1000": at(1000),
    },
    "OpenCoder-LLM/OpenCoder-1.5B-Base-Checkpoints, …-8B-…": {
        "pretrain_iter_0001000": at(1000, stage_label="pretrain"),
        "pretrain_iter_0484865": at(484_865, stage_label="pretrain"),
        "anneal_iter_0001000": at(1000, stage_label="anneal"),
        "anneal_iter_0023841": at(23_841, stage_label="anneal"),
    },
    "TinyLlama/tinyLlama-intermediate-checkpoints": {
        "step-5k-token-10B": at(5 * K, 10 * B),
        "step-50k-token-105B": at(50 * K, 105 * B),
        "step-480k-token-1007B": at(480 * K, 1007 * B),
    },
    "TinyLlama/TinyLlama-1.1B-intermediate-step-… (a repository each)": {
        "TinyLlama-1.1B-step-50K-105b": at(50 * K, 105 * B),
        "TinyLlama-1.1B-intermediate-step-240k-503b": at(240 * K, 503 * B),
        "TinyLlama-1.1B-intermediate-step-480k-1T": at(480 * K, 1 * T),
        "TinyLlama-1.1B-intermediate-step-955k-token-2T": at(955 * K, 2 * T),
        "TinyLlama-1.1B-intermediate-step-1195k-token-2.5T": at(1195 * K, 2500 * B),
        "TinyLlama-1.1B-intermediate-step-1431k-3T": at(1431 * K, 3 * T),
    },
    "HuggingFaceFW/ablation-model-fineweb-edu": {
        "step-001000-2BT": at(1000, 2 * B),
    },
    "HPLT/hplt2c_eng_checkpoints": {
        "checkpoint_0001000": at(1000),
        "checkpoint_0047684": at(47_684),
    },
    "OpenLLM-France/Lucie-7B": {
        "step0005000": at(5000),
        "step0753851": at(753_851),
        "extension_step0000250": at(250, stage_label="extension"),
    },
    "Gaperon-1125-8B, Gaperon-1125-24B (folders)": {
        "step-0334000_tokens-0700B-phase1": stage(1, 334_000, 700 * B, label="phase1"),
        "step-0859000_tokens-1803B-phase2": stage(2, 859_000, 1803 * B, label="phase2"),
    },
    "openeurollm/prelude-checkpoints (folders)": {
        "openeurollm/prelude-checkpoints/iter_0480000": at(480_000),
        "iter_0953312": at(953_312),
    },
    "bigscience/bloom-560m-intermediate (tags)": {
        "global_step1000": at(1000),
        "global_step100000": at(100_000),
    },
    "baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints": {
        "train_00220B": at(None, 220 * B),
        "train_02420B": at(None, 2420 * B),
    },
    "togethercomputer/RedPajama-INCITE-7B-Base": {
        "240b_tokens": at(None, 240 * B),
        "720b_tokens": at(None, 720 * B),
        "1t_tokens": at(None, 1 * T),
    },
    "m-a-p/neo_scalinglaw_250M (subfolders), m-a-p/neo_7b_intermediate": {
        "hf_ckpt/16.78B": at(None, 16_780 * M),
        "hf_ckpt/33.55B": at(None, 33_550 * M),
        "iter_0444213": at(444_213),
    },
    "TJUNLP/FuxiTranyu-8B": {
        "531B": at(None, 531 * B),
    },
    "openlm-research/open_llama_7b_700bt_preview (a repository each)": {
        "openlm-research/open_llama_7b_700bt_preview": at(None, 700 * B),
        "openlm-research/open_llama_3b_600bt_preview": at(None, 600 * B),
    },
    "inclusionAI/Ling-mini-base-2.0-5T (a repository each; Ling-1T is a model of that size)": {
        "Ling-mini-base-2.0-5T": at(),
        "Ling-1T": at(),
    },
    "stanford-crfm/alias-gpt2-small-x21": {
        "checkpoint-400000": at(400_000),
    },
    "LLM360/K2 (unconfirmed)": {
        "ckpt_360": at(360),
    },
}

#: Conventions of training tools, and names that can be understood in two ways.
OTHERS: dict[str, CheckpointName] = {
    "checkpoint-500": at(500),
    "checkpoint-1000step": at(),
    "global_step500": at(500),
    "global-step-500": at(500),
    "iter_7": at(7),
    "STEP_12": at(12),
    "epoch=0-step=100": at(100),
    "epoch=0-step=100.ckpt": at(100),
    "checkpoint-3-step500": at(500),
    "step_20k": at(20 * K),
    "step-1.5k": at(1500),
    "step2.5M": at(2_500_000),
    "iter_10K": at(10 * K),
    "step1000.pt": at(1000),
    "step5-tokens1.5T": at(5, 1500 * B),
    "runs/seed3/step100": at(100, seed="3"),
    "runs/pretrain/checkpoints/step300": at(300),
    "weight_decay0.1-step5": at(5),
    "timestep5": at(),
    "one-step-beyond": at(),
    "step9/notes": at(),
    # Numbers that can be read in two ways are not read.
    "step-1431x": at(),
    "step1.5": at(),
    "step1.000": at(),
    "step1,000": at(),
    "step1_000": at(),
    "step10_20": at(),
    "step1e5": at(),
    "step1.2345k": at(),
    "step1000B": at(),
    "step5-iter6": at(),
    "checkpoint-10k": at(),
    "ckpt_100M": at(),
    "step1000-7B": at(1000),
    "stage1.5-step3": at(3),
    "v1.0": at(),
    "": at(),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [case for names in (*PUBLISHED.values(), OTHERS) for case in names.items()],
)
def test_names_are_read_as_published(name: str, expected: CheckpointName) -> None:
    assert parse_checkpoint_name(name) == expected


def test_the_table_is_of_many_families() -> None:
    assert sum(len(names) for names in PUBLISHED.values()) >= 120
    assert len(PUBLISHED) >= 30


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r"Step (\d+)$", "Saving HF Model -- Step 1000", at(1000)),
        (r"-(?P<tokens>[0-9]+T)$", "Ling-mini-base-2.0-5T", at(None, 5 * T)),
        (r"-x(?P<seed>\d+)", "alias-gpt2-small-x21", at(seed="21")),
        (r"(?P<stage>[a-z]+)-(?P<step>\d+k)", "cool-20k", at(20 * K, stage_label="cool")),
        (r"p(?P<stage>\d)s(?P<step>\d+)", "p2s30", stage(2, 30)),
        (r"ckpt_(?P<words>\d+M)", "runs/ckpt_100M", at(words=100 * M)),
        (r"(?P<branch>left|right)_", "left_step4", at(4, branch="left")),
        (r"nothing(\d)", "step5", at(5)),
    ],
)
def test_a_step_pattern_reads_the_rest(pattern: str, name: str, expected: CheckpointName) -> None:
    assert parse_checkpoint_name(name, step_pattern(pattern)) == expected


@pytest.mark.parametrize("pattern", ["(", r"\d+", r"(\d)(\d)", r"(?P<epoch>\d+)", "a{99999999999}"])
def test_a_step_pattern_that_says_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointSpecError, match=re.escape(repr(pattern))):
        step_pattern(pattern)


def test_a_step_pattern_must_find_numbers() -> None:
    with pytest.raises(CheckpointSpecError, match=r"found step 'abc' in 'x-abc'.*expected"):
        parse_checkpoint_name("x-abc", step_pattern(r"x-(?P<step>\w+)"))


def test_stages_are_sorted_as_they_are_trained() -> None:
    names = [
        "pretrain_iter_0001000",
        "stage1-step-40000",
        "stage2-step-3480000",
        "stage10-step1",
        "anneal_iter_0001000",
        "lc-4k-to-32k-step-4000",
        "lc-32k-to-64k-step-4000",
        "it-SFT",
    ]
    read = [parse_checkpoint_name(name) for name in names]
    keys = [stage_key(name.stage, name.stage_label) for name in read]
    assert keys == sorted(keys)
    assert keys[0] == keys[1] == stage_key(None, None)


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
    parsed = parse_checkpoint_name(name)
    assert (parsed.step, parsed.tokens, parsed.stage) == (step, billions * 10**9, stage)
