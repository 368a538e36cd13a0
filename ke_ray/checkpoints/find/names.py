"""Names of checkpoints: the step, tokens and stage in them.

Published names are irregular, so they are parsed tolerantly and never built. A number that can be
understood in two ways is left out: ``step`` is None then, and a listing says so.

=================================================  ==========  =========  =======
name                                               step        tokens     stage
=================================================  ==========  =========  =======
``step738020-tokens3095B``                         738020      3.095e12   –
``stage1-step140000-tokens294B``                   140000      2.94e11    1
``stage2-ingredient1-step23852-tokens51B``         23852       5.1e10     2 (1)
``step0``, ``step143000``, ``step1000-unsharded``  as written  –          –
``step-1431k-3T``, ``step-50K-105b``               1431000, …  3e12, …    –
``step-1195k-token-2.5T``, ``step-001000-2BT``     1195000, …  2.5e12, …  –
``step_20k``, ``step-1.5k``                        20000, …    –          –
``checkpoint-500``, ``iter_0000500``               500         –          –
``ckpt_000`` (LLM360)                              0, a count  –          –
``main``, ``step-1431x``, ``step1_000``, ``v2``    –           –          –
=================================================  ==========  =========  =======
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# A word is not part of a longer one ("timestep5" names no step), but "_" and "-" separate.
_START = r"(?<![A-Za-z0-9])"
# All that could belong to the number is taken along, so that a half is never taken for the whole.
_NUMBER = r"([0-9][0-9A-Za-z.,+]*(?:_[0-9]+(?![0-9A-Za-z]))*)"
_STEP = re.compile(
    rf"{_START}(?:global[_-]?)?(?:(step|iteration|iter)|checkpoint|ckpt)s?[_=-]?{_NUMBER}", re.I
)
# At most 15 digits: more is not a step, and Python refuses to convert absurdly long ones.
_STEP_VALUE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KM]?)(?:\.[A-Z][A-Z0-9]*)*", re.I)
_TOKENS = re.compile(
    rf"{_START}(?:tokens?)[_=-]?([0-9]{{1,9}}(?:\.[0-9]{{1,6}})?)([KMBT]?)(?![A-Za-z0-9.])", re.I
)
# TinyLlama's "-3T" right after the step. "-7B" after a plain step may be the size of the model.
_BARE_TOKENS = re.compile(r"[_-]([0-9]{1,9}(?:\.[0-9]{1,6})?)(BT|T|B)(?![A-Za-z0-9.])", re.I)
_STAGE = re.compile(rf"{_START}stage[_-]?([0-9]{{1,15}})(?![0-9A-Za-z.])", re.I)
_INGREDIENT = re.compile(rf"{_START}ingredient[_-]?([0-9]{{1,15}})(?![0-9A-Za-z.])", re.I)
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "BT": 10**9, "T": 10**12}


@dataclass(frozen=True)
class CheckpointName:
    """The parts of a checkpoint's name; None where the name lacks them.

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
    step, tokens = _step_and_tokens(parts[-1] if parts else "")
    stage = ingredient = None
    for part in reversed(parts):
        stage = stage if stage is not None else _integer(_STAGE.search(part))
        ingredient = ingredient if ingredient is not None else _integer(_INGREDIENT.search(part))
    return CheckpointName(step, tokens, stage, ingredient)


def parse_step_and_tokens(name: str) -> tuple[int | None, int | None]:
    """``(step, tokens)`` of a name, each None where it is missing; never raises."""
    parsed = parse_checkpoint_name(name)
    return parsed.step, parsed.tokens


def _step_and_tokens(name: str) -> tuple[int | None, int | None]:
    numbers = list(_STEP.finditer(name))
    # "checkpoint-3-step500" numbers the checkpoint and names its step.
    numbers = [number for number in numbers if number.group(1)] or numbers
    values = {_step(number) for number in numbers}
    step = values.pop() if len(values) == 1 else None
    tokens = _TOKENS.search(name)
    if tokens is None and step is not None:
        tokens = _BARE_TOKENS.match(name, numbers[-1].end())
        is_abbreviated = numbers[-1].group(2)[-1].isalpha()
        if tokens and tokens.group(2).upper() == "B" and not is_abbreviated:
            tokens = None
    return step, None if tokens is None else _scaled(tokens.group(1), tokens.group(2))


def _step(number: re.Match[str]) -> int | None:
    value = _STEP_VALUE.fullmatch(number.group(2))
    if value is None:
        return None
    # "ckpt_100M" and "checkpoint-10k" may count tokens or words; "step1.000" may be 1,000.
    if number.group(1) is None if value.group(2) else "." in value.group(1):
        return None
    return _scaled(value.group(1), value.group(2))


def _scaled(number: str, unit: str) -> int | None:
    """None where the product is no whole number ("1.2345k")."""
    value = Fraction(number) * _SCALE[unit.upper()]
    return int(value) if value.denominator == 1 else None


def _integer(match: re.Match[str] | None) -> int | None:
    return int(match.group(1)) if match else None
