"""Where in which training run a checkpoint stands, and the order that follows from it.

A run has stages, which follow on; runs that start from one checkpoint are branches, runs from
other initial weights or data orders have other seeds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: The columns of a position, in order; each may be null.
POSITION = ("step", "tokens", "words", "stage", "stage_label", "seed", "branch")

#: Words for stages, in the order of training.
STAGE_WORDS = (
    r"pretrain(?:ing)?",
    r"anneal(?:ing)?|cooldown|decay|mid-?train(?:ing)?",
    r"lc-[0-9]{1,6}k-to-[0-9]{1,6}k|longctx|extension",
    r"it-[A-Za-z]+(?:-(?!step)[A-Za-z]+)*|sft|dpo",
)


def stage_key(stage: int | None, label: str | None) -> tuple[int, int, tuple[int, ...]]:
    """Sort key of stages in the order of training.

    Pretraining, numbered stages among it, comes before annealing, that before longer contexts,
    those before tuning to instructions. A checkpoint without a stage belongs to the first one.
    """
    if stage is not None:
        return 0, stage, ()
    ranks = (n for n, words in enumerate(STAGE_WORDS) if re.fullmatch(words, label or "", re.I))
    numbers = re.findall(r"[0-9]{1,15}", label or "")
    return next(ranks, 0), 1, tuple(map(int, numbers))


def stage_name(stage: int | None, label: str | None) -> str:
    """``stage 2`` or ``anneal``; empty where there is none."""
    return f"stage {stage}" if stage is not None else label or ""


def starts_again(first: float, end: float) -> bool:
    """Whether a stage whose numbers begin at ``first`` counts anew, the one before at ``end``.

    A stage that counts on may branch off before that end, as annealing from an earlier checkpoint
    does; one that counts anew begins far below it (OLMo-2's at 1,000 of 1.9 million steps).
    """
    return first <= end / 2


def position_key(position: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key of a position: seed, then numbered ones by stage, branch and number.

    Those whose number is unknown come last within their seed.
    """
    units = (position.get(unit) for unit in ("step", "tokens", "words"))
    numbers = [number for number in units if number is not None]
    return (
        natural_key(position.get("seed")),
        not numbers,
        stage_key(position.get("stage"), position.get("stage_label")),
        natural_key(position.get("branch")),
        numbers[:1],
    )


def natural_key(text: str | None) -> list[tuple[int, str]]:
    """Sort key by which "ingredient10" follows "ingredient9", and None comes first."""
    parts = re.findall(r"([0-9]{1,15})|([^0-9]+)", text or "")
    return [(int(digits or 0), other) for digits, other in parts]
