"""Probe texts as token spans, with the seam between context and target right.

A probe is a context and the target that completes it. Their texts have no blank at the seam; the
joint text is ``context + " " + target``, except where the context ends in an opening quotation
mark or bracket (after a blank), which belongs to what follows: twelve memorization probes of
Fictional Knowledge do, and the same probes in other words. (Where a probe's wording departs from
its paragraph it is scored as it is written.)

The joint text is tokenised once, so that the target gets the tokens it has in running text: its
*target tokens* are those that overlap the target's characters, by the tokenizer's offsets, and all
that come before are context. A token that straddles the seam counts as target, since part of the
target is in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ke_ray.data.facts import LEVELS, FactSet
from ke_ray.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_QUOTES = "\"'`“‘«‹„‚"
_BRACKETS = "([{"


@dataclass(frozen=True)
class Probe:
    """A probe ready to score.

    Attributes:
        setting: ``once`` or ``paraphrase``.
        instance: the paragraph's index in its facts file.
        level: ``memorization``, ``semantic`` or ``compositional``.
        probe: number within its level.
        context_ids: at least one token.
        target_ids: at least one token.
    """

    setting: str
    instance: int
    level: str
    probe: int
    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """The probe's name in messages."""
        return f"probe {self.probe} ({self.level}) of {self.setting} fact {self.instance}"


def _opens(context: str) -> bool:
    """Whether the context's last character opens a quotation or bracket."""
    if not context:
        return False
    if context[-1] in _BRACKETS:
        return True
    before = context[-2:-1]
    return context[-1] in _QUOTES and (not before or before.isspace() or before in _BRACKETS)


def join_probe(context: str, target: str) -> tuple[str, int]:
    """The joint text and the character at which the target starts.

    Blanks at the seam (the context's last, the target's first) are one blank, or none after an
    opening quotation mark.
    """
    context, target = context.rstrip(), target.strip()
    seam = "" if not context or _opens(context) else " "
    return context + seam + target, len(context) + len(seam)


def build_probes(
    fact_sets: Iterable[FactSet], tokenizer: Tokenizer, *, max_positions: int | None = None
) -> list[Probe]:
    """All probes of the facts, in the order of sets, facts, levels and probes.

    Args:
        fact_sets: facts with their setting.
        tokenizer: the model's own; no special token is added.
        max_positions: how many tokens the model takes; None: no limit.

    Raises:
        DataError: a target without a token, a context without one of its own, or a probe longer
            than ``max_positions``; named.
    """
    probes, texts, starts = [], [], []
    for facts in fact_sets:
        for instance, fact in enumerate(facts.facts):
            for level in LEVELS:
                for number, (context, target) in enumerate(fact.probes.get(level, ())):
                    text, start = join_probe(context, target)
                    probes.append(Probe(facts.setting, instance, level, number, (), ()))
                    texts.append(text)
                    starts.append(start)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
        _with_tokens(probe, encoding, start, max_positions)
        for probe, encoding, start in zip(probes, encodings, starts, strict=True)
    ]


def _with_tokens(probe: Probe, encoding: Encoding, start: int, max_positions: int | None) -> Probe:
    """The probe with the tokens of its joint text, whose target starts at character ``start``."""
    size = next((i for i, (_, end) in enumerate(encoding.offsets) if end > start), None)
    if size is None:
        raise DataError(
            f"The target of {probe.name} has no token; give the text that completes it."
        )
    if size == 0:
        raise DataError(f"The context of {probe.name} has no token of its own; give a context.")
    # The last target token is predicted, not read: it needs no position.
    if max_positions is not None and len(encoding.ids) - 1 > max_positions:
        raise DataError(
            f"The {probe.name} has {size} context and {len(encoding.ids) - size} target tokens, "
            f"and the model takes {max_positions}; shorten its context."
        )
    return replace(
        probe, context_ids=tuple(encoding.ids[:size]), target_ids=tuple(encoding.ids[size:])
    )
