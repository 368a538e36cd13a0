"""Probe texts as token spans, with the seam between context and target right.

A probe is a context and the target that completes it. Their texts have no blank at the seam; the
joint text is ``context + " " + target``, except where the context ends in an opening quotation
mark or bracket (after a blank), which nothing may part from what follows: twelve memorization
probes of Fictional Knowledge, and the same probes in other words. (Where a probe's wording departs
from its paragraph it is scored as it is written.)

The joint text is tokenised once, so that the target gets the tokens it has in running text: its
*target tokens* are those that overlap the target's characters, by the tokenizer's offsets, and all
that come before are context. A token that straddles the seam counts as target, since part of the
target is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ke_ray.data.facts import LEVELS, FactSet
from ke_ray.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_QUOTES = "\"'`“‘«‹„‚"
_BRACKETS = "([{"


@dataclass(frozen=True)
class Probe:
    """A probe ready to score.

    Attributes:
        setting: ``once`` or ``paraphrase``.
        instance: the paragraph's place in its facts file.
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
        """How messages call it."""
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


def _split(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], start: int, end: int, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = next((i for i, (a, b) in enumerate(offsets) if a < end and b > start), None)
    if first is None:
        raise DataError(f"The target of {where} has no token; give the text that completes it.")
    if first == 0:
        raise DataError(f"The context of {where} has no token of its own; give a context.")
    return tuple(ids[:first]), tuple(ids[first:])


def tokenize_probe(
    tokenizer: Tokenizer, context: str, target: str, *, where: str = "the probe"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of the context and of the target.

    Args:
        tokenizer: gives ids and offsets; no special token is added.
        context: text before the target.
        target: text to be scored.
        where: names the probe in messages.

    Raises:
        DataError: an empty target, or a context without a token of its own.
    """
    if not target.strip():
        raise DataError(f"The target of {where} is empty; give the text that completes it.")
    text, start = join_probe(context, target)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return _split(encoding.ids, encoding.offsets, start, len(text), where)


def build_probes(
    fact_sets: Iterable[FactSet], tokenizer: Tokenizer, *, max_positions: int | None = None
) -> list[Probe]:
    """All probes of the facts, in the order of sets, facts, levels and probes.

    Args:
        fact_sets: facts with their setting.
        tokenizer: the model's own.
        max_positions: how many tokens the model takes; None: no limit.

    Raises:
        DataError: a target that is empty, or a probe longer than ``max_positions``; named.
    """
    keys = []
    texts: list[str] = []
    starts = []
    for facts in fact_sets:
        for instance, fact in enumerate(facts.facts):
            for level in LEVELS:
                for number, (context, target) in enumerate(fact.probes.get(level, ())):
                    probe = Probe(facts.setting, instance, level, number, (), ())
                    if not target.strip():
                        raise DataError(f"The target of {probe.name} is empty.")
                    text, start = join_probe(context, target)
                    keys.append(probe)
                    texts.append(text)
                    starts.append(start)
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    probes = []
    for key, text, start, encoding in zip(keys, texts, starts, encodings, strict=True):
        context_ids, target_ids = _split(encoding.ids, encoding.offsets, start, len(text), key.name)
        probe = Probe(key.setting, key.instance, key.level, key.probe, context_ids, target_ids)
        # The last target token is predicted, not read: it needs no position.
        needed = len(context_ids) + len(target_ids) - 1
        if max_positions is not None and needed > max_positions:
            raise DataError(
                f"The {probe.name} has {len(context_ids)} context and {len(target_ids)} target "
                f"tokens, and the model takes {max_positions}; shorten its context."
            )
        probes.append(probe)
    return probes
