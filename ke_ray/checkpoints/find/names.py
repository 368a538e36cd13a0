"""What the name of a checkpoint says: step, tokens, stage.

Published names are irregular, so they are read tolerantly and never built:

======================================================  ==========  =========  =======
name                                                    step        tokens     stage
======================================================  ==========  =========  =======
``step738020-tokens3095B``                              738020      3.095e12   –
``stage1-step140000-tokens294B``                        140000      2.94e11    1
``stage2-ingredient1-step23852-tokens51B``              23852       5.1e10     2 (1)
``step0``, ``step143000``, ``step1000-unsharded``       as written  –          –
``checkpoint-500``, ``global_step500``, ``iter_0000500``  500       –          –
``main``                                                –           –          –
======================================================  ==========  =========  =======
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CheckpointName", "parse_checkpoint_name", "parse_step_and_tokens"]

# At most 15 digits: more is not a step, and Python refuses to convert absurdly long ones.
_NUMBER = r"([0-9]{1,15})(?![0-9])"
# A word is not part of a longer one ("timestep5" names no step), but "_" and "-" separate.
_START = r"(?<![A-Za-z0-9])"
_STEP = re.compile(
    rf"{_START}(?:global[_-]?)?(?:step|checkpoint|ckpt|iteration|iter)s?[_=-]?{_NUMBER}", re.I
)
_TOKENS = re.compile(
    rf"{_START}(?:tokens?)[_=-]?([0-9]{{1,9}}(?:\.[0-9]{{1,6}})?)([KMBT])?(?![A-Za-z0-9.])", re.I
)
_STAGE = re.compile(rf"{_START}stage[_-]?{_NUMBER}", re.I)
_INGREDIENT = re.compile(rf"{_START}ingredient[_-]?{_NUMBER}", re.I)
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class CheckpointName:
    """The parts of a checkpoint's name; None where the name does not say.

    ``tokens`` is a count of tokens, rounded as the name rounds it.
    """

    step: int | None = None
    tokens: int | None = None
    stage: int | None = None
    ingredient: int | None = None


def parse_checkpoint_name(name: str) -> CheckpointName:
    """Read a revision, a folder name, a path or a URL; never raises.

    The step and the tokens come from the last component; stage and ingredient from the last
    component that names them, because native folders carry them one level up.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part]
    last = parts[-1] if parts else ""
    step = _STEP.search(last)
    tokens = _TOKENS.search(last)
    stage = ingredient = None
    for part in reversed(parts):
        stage = stage if stage is not None else _integer(_STAGE.search(part))
        ingredient = ingredient if ingredient is not None else _integer(_INGREDIENT.search(part))
    return CheckpointName(_integer(step), _token_count(tokens), stage, ingredient)


def parse_step_and_tokens(name: str) -> tuple[int | None, int | None]:
    """``(step, tokens)`` of a name, each None where it does not say; never raises."""
    parsed = parse_checkpoint_name(name)
    return parsed.step, parsed.tokens


def _integer(match: re.Match[str] | None) -> int | None:
    return int(match.group(1)) if match else None


def _token_count(match: re.Match[str] | None) -> int | None:
    if match is None:
        return None
    whole, _, fraction = match.group(1).partition(".")
    scale = _SCALE[(match.group(2) or "").upper()]
    return int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)
