"""How far training had come: tokens over all stages, and checkpoints missing from a series."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core.position import stage_key, starts_again

_LEAST_CHECKPOINTS = 8  # fewer show no rule that one could be missing from
_MOST_HOLES = 5  # named in a note


def with_tokens(
    refs: Sequence[CheckpointRef], tokens_per_step: int | None = None
) -> list[CheckpointRef]:
    """The same references with ``tokens`` counted over all stages.

    Where the counts of a stage start again below the end of the stage before, as OLMo-2's do, they
    follow on from there. Runs that branch off within a stage all start at its beginning.

    Args:
        refs: all checkpoints of one or several series, in any order.
        tokens_per_step: batch size × sequence length; gives tokens where names count steps only.
    """
    own: dict[int, int] = {}  # tokens that the name of a reference gives, by its place
    runs: dict[tuple[Any, ...], dict[tuple[Any, ...], list[int]]] = defaultdict(dict)
    for place, ref in enumerate(refs):
        tokens = ref.tokens
        if tokens is None and ref.step is not None and tokens_per_step is not None:
            tokens = ref.step * tokens_per_step
        if tokens is not None:
            own[place] = tokens
            runs[ref.series, ref.seed].setdefault(stage_key(ref.stage, ref.stage_label), []).append(
                place
            )
    result = list(refs)
    for stages in runs.values():
        end = 0
        for _, places in sorted(stages.items()):
            is_new = starts_again(min(own[place] for place in places), end)
            offset = end if is_new else 0
            for place in places:
                result[place] = replace(refs[place], tokens=own[place] + offset)
            end = offset + max(own[place] for place in places)
    return result


def missing_checkpoints(refs: Sequence[CheckpointRef]) -> list[str]:
    """Sentences on the holes in series that are regular otherwise.

    Args:
        refs: in training order, before every n-th is chosen.
    """
    series: dict[tuple[Any, ...], list[CheckpointRef]] = defaultdict(list)
    for ref in refs:
        series[ref.series, ref.seed, stage_key(ref.stage, ref.stage_label), ref.branch].append(ref)
    notes = []
    for members in series.values():
        unit = next(
            (unit for unit in ("step", "tokens", "words") if getattr(members[0], unit) is not None),
            "step",
        )
        numbers = sorted({n for ref in members if (n := getattr(ref, unit)) is not None})
        holes, spacing = _holes(numbers)
        if not holes:
            continue
        missing = {hole: round((hole[1] - hole[0]) / spacing) - 1 for hole in holes}
        largest = sorted(sorted(missing, key=lambda hole: -missing[hole])[:_MOST_HOLES])
        shown = "; ".join(f"{low:,} to {high:,} ({missing[low, high]})" for low, high in largest)
        if len(holes) > _MOST_HOLES:
            shown = f"{len(holes)} holes, the largest {shown}"
        first = members[0]
        labels = (first.series, first.seed and f"seed {first.seed}", first.stage_label)
        named = ", ".join(filter(None, (*labels, first.branch))) if len(series) > 1 else ""
        notes.append(
            f"Most checkpoints{f' of {named}' if named else ''} are {spacing:,} "
            f"{'steps' if unit == 'step' else unit} apart, but {sum(missing.values()):,} are "
            f"missing: {shown}."
        )
    return notes


def _holes(numbers: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """(the pairs of neighbours between which others are missing, the regular distance)."""
    if len(numbers) < _LEAST_CHECKPOINTS:
        return [], 0
    pairs = list(itertools.pairwise(numbers))
    spacing, count = Counter(high - low for low, high in pairs).most_common(1)[0]
    holes = [(low, high) for low, high in pairs if high - low >= 1.5 * spacing]
    is_regular = 2 * count >= len(pairs) and 2 * len(holes) <= count
    return holes if is_regular else [], spacing
