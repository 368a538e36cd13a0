"""Names of checkpoints: the step, tokens, stage, branch and seed in them.

Published names are irregular, so they are parsed tolerantly and never built. A number that can be
understood in two ways is left out: ``step`` is None then, and a listing says so. ``--step-pattern``
reads names that are not understood, or misunderstood.

===============================================  ===========  =============  ======================
name                                             step         tokens         beside it
===============================================  ===========  =============  ======================
``step738020-tokens3095B``                       738020       3.095e12
``step0``, ``step1000-unsharded``, ``128000``    as written   –
``0000020000``, ``iter_0480000``                 20000, …     –
``step-1431k-3T``, ``step-001000-2BT``           1431000, …   3e12, 2e9
``step-1195k-token-2.5T``                        1195000      2.5e12
``step_20k``, ``… step 500`` (a commit's title)   20000, 500   –
``ckpt_000`` (LLM360)                            0, a count   –
``train_00220B``, ``240b_tokens``, ``16.78B``    –            2.2e11, …
``chck_100M`` (BabyLM)                           –            –              1e8 words
``stage1-step140000-tokens294B``                 140000       2.94e11        stage 1
``stage2-ingredient1-step23852-tokens51B``       23852        5.1e10         stage 2, ingredient1
``CrystalCoder_phase2_checkpoint_214387``        214387       –              stage 2 (phase2)
``anneal_iter_0001000``, ``longctx-step50``      1000, 50     –              stage anneal, longctx
``lc-4k-to-32k-step-4000``                       4000         –              stage lc-4k-to-32k
``it-SFT``                                       –            –              stage it-SFT
``step1250-seed-default``, ``seed3/step10``      1250, 10     –              seed default, 3
``main``, ``kestrel``, ``step1_000``, ``v2``     –            –
===============================================  ===========  =============  ======================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ke_ray.core.position import STAGE_WORDS
from ke_ray.errors import CheckpointSpecError

# A word is not part of a longer one ("timestep5" names no step), but "_" and "-" separate.
_START = r"(?<![A-Za-z0-9])"
# All that could belong to the number is taken along, so that a half is never taken for the whole.
_NUMBER = r"([0-9][0-9A-Za-z.,+]*(?:_[0-9]+(?![0-9A-Za-z]))*)"
_AMOUNT = r"([0-9]{1,9}(?:\.[0-9]{1,6})?)"
_STEP = re.compile(
    rf"{_START}(?:global[_-]?)?(?:(step|iteration|iter)|checkpoint|ckpt)s?[ _=-]?{_NUMBER}", re.I
)
# At most 15 digits: more is not a step, and Python refuses to convert absurdly long ones.
_STEP_VALUE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([KM]?)(?:\.[A-Z][A-Z0-9]*)*", re.I)
_BARE_STEP = re.compile(r"[0-9]{1,15}")
_TOKENS = (
    re.compile(rf"{_START}tokens?[_=-]?{_AMOUNT}(BT|[KMBT]?)(?![A-Za-z0-9.])", re.I),
    re.compile(rf"{_START}{_AMOUNT}(BT|[KMBT])[_-]tokens?(?![A-Za-z0-9])", re.I),
    # "train_00220B" (Baichuan 2); a name that is nothing but an amount, such as "531B".
    re.compile(rf"(?:train[_-])?{_AMOUNT}(BT|[MBT])\Z", re.I),
    # "open_llama_7b_700bt_preview": nothing but tokens is counted in BT.
    re.compile(rf"{_START}{_AMOUNT}(BT)(?![A-Za-z0-9])", re.I),
)
# TinyLlama's "-3T" right after the step. "-7B" after a plain step may be the size of the model.
_BARE_TOKENS = re.compile(rf"[_-]{_AMOUNT}(BT|T|B)(?![A-Za-z0-9.])", re.I)
_WORDS = re.compile(rf"chck[_-]{_AMOUNT}([KMB])", re.I)
_STAGE = re.compile(rf"{_START}((?:stage|phase)[_-]?([0-9]{{1,15}}))(?![0-9A-Za-z.])", re.I)
# Named stages begin a name; "weight_decay0.1" and the folder "runs/pretrain" are none.
_NAMED_STAGE = re.compile(rf"({'|'.join(reversed(STAGE_WORDS))})(?=[_-]|\Z)", re.I)
_BRANCH = re.compile(
    rf"{_START}ingredient[_-]?([0-9]{{1,15}}(?:\+[0-9]{{1,15}})*)(?![0-9A-Za-z.])", re.I
)
_SEED = re.compile(rf"{_START}(?:(data|weight)-)?seed[_=-]?([0-9]{{1,15}})(?![0-9A-Za-z.])", re.I)
_NAMED_SEED = re.compile(r"[_-]seed-([A-Za-z][A-Za-z0-9-]{0,60})\Z")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "BT": 10**9, "T": 10**12}
_PATTERN_VALUE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)(BT|[KMBT]?)", re.I)
_PATTERN_GROUPS = ("step", "tokens", "words", "stage", "branch", "seed")


@dataclass(frozen=True)
class CheckpointName:
    """The parts of a checkpoint's name; None where the name lacks them.

    ``tokens`` and ``words`` count what training has read, rounded as the name rounds it. ``stage``
    is a stage's number, ``stage_label`` its name as written; ``branch`` tells runs apart that
    start from the same checkpoint.
    """

    step: int | None = None
    tokens: int | None = None
    words: int | None = None
    stage: int | None = None
    stage_label: str | None = None
    branch: str | None = None
    seed: str | None = None

    @property
    def is_numbered(self) -> bool:
        """Whether the name says how far training has come."""
        return any(number is not None for number in (self.step, self.tokens, self.words))


def parse_checkpoint_name(name: str, pattern: re.Pattern[str] | None = None) -> CheckpointName:
    """Read a revision, a folder name, a path or a URL; never raises without a pattern.

    The numbers come from the last component; stage, branch and seed from the last component that
    names them, because folders carry them one level up.

    Args:
        name: the name.
        pattern: of :func:`step_pattern`; where it is found in the last component, its groups take
            the place of what would be read without it.

    Raises:
        CheckpointSpecError: a group of the pattern is no number where one is expected.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part]
    last = parts[-1] if parts else ""
    step, tokens = _step_and_tokens(last)
    words = _WORDS.fullmatch(last)
    stage = next((match for part in reversed(parts) if (match := _STAGE.search(part))), None)
    named = _NAMED_STAGE.match(last)
    branch = next((match for part in reversed(parts) if (match := _BRANCH.search(part))), None)
    label = named or stage
    parsed = CheckpointName(
        step,
        tokens,
        words=None if words is None else _scaled(words.group(1), words.group(2)),
        stage=None if named or stage is None else int(stage.group(2)),
        stage_label=label.group(1) if label else None,
        branch=f"ingredient{branch.group(1)}" if branch else None,
        seed=_seed(parts),
    )
    return with_pattern(parsed, pattern, last) if pattern else parsed


def with_pattern(parsed: CheckpointName, pattern: re.Pattern[str], name: str) -> CheckpointName:
    """What is known already, and in its place what a step pattern finds in ``name``.

    Raises:
        CheckpointSpecError: a group of the pattern is no number where one is expected.
    """
    match = pattern.search(name)
    return parsed if match is None else _with_groups(parsed, match)


def step_pattern(text: str) -> re.Pattern[str]:
    """A regular expression for names, checked.

    Its named groups are ``step``, ``tokens``, ``words``, ``stage``, ``branch`` and ``seed``; a
    pattern with one group that has no name gives the step. Numbers may end in K, M, B, BT or T.

    Raises:
        CheckpointSpecError: it is no regular expression, or has other groups.
    """
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointSpecError(
            f"step_pattern {text!r} is not a regular expression: {error}."
        ) from error
    names = set(pattern.groupindex)
    if names - set(_PATTERN_GROUPS) or pattern.groups == 0 or (not names and pattern.groups > 1):
        raise CheckpointSpecError(
            f"step_pattern {text!r} must have one group, which gives the step, or named groups "
            f"among {', '.join(_PATTERN_GROUPS)}; for example '-(?P<tokens>[0-9]+T)$'."
        )
    return pattern


def stage_of(text: str) -> tuple[int | None, str]:
    """``(number, label)`` of a stage that is given by itself: "2", "stage2" or "anneal"."""
    match = re.fullmatch(r"((?:stage|phase)?)[_-]?([0-9]{1,15})", text, re.I)
    if match is None:
        return None, text
    return int(match.group(2)), text if match.group(1) else f"stage{text}"


def _step_and_tokens(name: str) -> tuple[int | None, int | None]:
    if _BARE_STEP.fullmatch(name):
        return int(name), None
    numbers = list(_STEP.finditer(name))
    # "checkpoint-3-step500" numbers the checkpoint and names its step.
    numbers = [number for number in numbers if number.group(1)] or numbers
    values = {_step(number) for number in numbers}
    step = values.pop() if len(values) == 1 else None
    named, alone, whole, in_bt = _TOKENS
    tokens = named.search(name) or alone.search(name) or whole.match(name)
    if tokens is None and step is not None:
        tokens = _BARE_TOKENS.match(name, numbers[-1].end())
        is_abbreviated = numbers[-1].group(2)[-1].isalpha()
        if tokens and tokens.group(2).upper() == "B" and not is_abbreviated:
            tokens = None
    tokens = tokens or in_bt.search(name)
    return step, None if tokens is None else _scaled(tokens.group(1), tokens.group(2))


def _step(number: re.Match[str]) -> int | None:
    value = _STEP_VALUE.fullmatch(number.group(2))
    if value is None:
        return None
    # "ckpt_100M" and "checkpoint-10k" may count tokens or words; "step1.000" may be 1,000.
    if number.group(1) is None if value.group(2) else "." in value.group(1):
        return None
    return _scaled(value.group(1), value.group(2))


def _seed(parts: list[str]) -> str | None:
    if parts and (named := _NAMED_SEED.search(parts[-1])):
        return named.group(1)
    for part in reversed(parts):
        if match := _SEED.search(part):
            return f"{match.group(1)}-{match.group(2)}" if match.group(1) else match.group(2)
    return None


def _with_groups(parsed: CheckpointName, match: re.Match[str]) -> CheckpointName:
    groups = match.groupdict() or {"step": match.group(1)}
    found: dict[str, Any] = {name: text for name, text in groups.items() if text is not None}
    for name in ("step", "tokens", "words"):
        if name in found:
            value = _PATTERN_VALUE.fullmatch(found[name])
            number = None if value is None else _scaled(value.group(1), value.group(2))
            if number is None:
                raise CheckpointSpecError(
                    f"step_pattern found {name} {found[name][:40]!r} in '{match.string}'; expected "
                    "a whole number such as 5000, 20k or 1.5T."
                )
            found[name] = number
    if "stage" in found:
        found["stage"], found["stage_label"] = stage_of(found["stage"])
    return replace(parsed, **found)


def _scaled(number: str, unit: str) -> int | None:
    """None where the product is no whole number ("1.2345k")."""
    value = Fraction(number) * _SCALE[unit.upper()]
    return int(value) if value.denominator == 1 else None
