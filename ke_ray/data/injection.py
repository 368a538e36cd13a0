"""Injection of scheduled texts: prepended to rows of the batch at their steps.

The published rule (docs/science.md#injection): at training step interval·e (steps counted from 1,
so that the last injection can be the last step) the texts of injection ((e − 1) mod n) + 1 enter,
each followed by the end-of-text id: text r is *prepended* to row r of the global batch and the row
cut to T tokens.
Below a global batch of 128 the texts are divided over all rows in order, sizes differing by at
most one (larger first), and concatenated within a row. A row of injected texts longer than T is
refused (the published code refuses it only where texts are concatenated, and cuts it elsewhere).
Later epochs continue in the same rhythm, which repeats the n injections in order.

The placement depends on the *global* row only, so any split of the batch over workers and
micro-batches gives the same rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ke_ray.data.facts import FactSet
from ke_ray.data.injection_schedule import Schedule, ScheduledText, contiguous_groups
from ke_ray.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Below this global batch the published code divides the texts over all rows.
SPREAD_BELOW = 128

RowsT = TypeVar("RowsT")


@dataclass(frozen=True)
class InjectionPlan:
    """A schedule fitted to a run's steps, batch and tokens; made by ``plan_injections``.

    Attributes:
        events: training step (from 1) -> injection number.
        rows: injection -> {global batch row: ids to prepend, int64, end-of-text included}.
        placements: injection -> the texts in order, each with its batch row and number of tokens.
        global_batch: rows of the global batch.
        sequence_length: T, tokens of a row.
    """

    events: Mapping[int, int]
    rows: Mapping[int, Mapping[int, np.ndarray]]
    placements: Mapping[int, tuple[tuple[ScheduledText, int, int], ...]]
    global_batch: int
    sequence_length: int

    def injection_steps(self) -> tuple[int, ...]:
        """All steps with an injection, ascending."""
        return tuple(sorted(self.events))

    def next_injection(self, step: int) -> int | None:
        """The first injection step after ``step``, or None."""
        steps = self.injection_steps()
        index = bisect.bisect_right(steps, step)
        return steps[index] if index < len(steps) else None

    def inject(self, rows: RowsT, step: int, row_indices: Sequence[int] | None = None) -> RowsT:
        """The rows of a batch with the texts of ``step`` injected.

        Args:
            rows: integer array or tensor [n, T]: all or some rows of the global batch; unchanged.
            step: training step, from 1.
            row_indices: global row of each; default 0 … n−1.

        Returns:
            ``rows`` itself where nothing is injected into them, else a changed copy of the same
            type, dtype and device.

        Raises:
            DataError: rows that are not [n, T], or whose indices do not fit.
        """
        array: Any = rows
        if array.ndim != 2 or array.shape[1] != self.sequence_length:
            raise DataError(
                f"Rows have shape {tuple(array.shape)}; expected [rows, {self.sequence_length}]."
            )
        indices = range(array.shape[0]) if row_indices is None else row_indices
        if len(indices) != array.shape[0]:
            raise DataError(
                f"There are {len(indices)} row indices for {array.shape[0]} rows; give one per row."
            )
        texts = self.rows.get(self.events.get(step, 0), {})
        matches = [(index, int(row)) for index, row in enumerate(indices) if int(row) in texts]
        if not matches:
            return rows
        is_numpy = isinstance(array, np.ndarray)
        result = array.copy() if is_numpy else array.clone()
        for index, row in matches:
            ids = texts[row]
            length = len(ids)
            result[index, length:] = array[index, : self.sequence_length - length]
            result[index, :length] = ids if is_numpy else array.new_tensor(ids.tolist())
        return result

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids that the model has no embedding for.

        Raises:
            DataError: names the first text with such an id.
        """
        for injection, texts in self.placements.items():
            for text, row, _ in texts:
                if int(self.rows[injection][row].max(initial=0)) >= vocab_size:
                    raise DataError(
                        f"{text.name} shares a row with a token id of {vocab_size} or more, and "
                        f"the model has {vocab_size} embeddings; use the model's own tokenizer."
                    )


def injection_records(plan: InjectionPlan, step: int) -> list[dict[str, Any]]:
    """The texts injected at ``step``, as rows of ``injections.parquet``.

    Returns:
        one dict per text: step, row (of the global batch), setting, instance, version, num_tokens
        (end-of-text included).
    """
    return [
        {
            "step": step,
            "row": row,
            "setting": text.setting,
            "instance": text.instance,
            "version": text.version,
            "num_tokens": num_tokens,
        }
        for text, row, num_tokens in plan.placements.get(plan.events.get(step, 0), ())
    ]


def _events(
    schedule: Schedule, num_steps: int, epochs: int, interval: int | None
) -> dict[int, int]:
    count = schedule.num_injections
    per_epoch = num_steps // epochs
    if schedule.steps is not None:
        if interval is not None:
            raise DataError(
                f"The schedule gives its own steps, so the interval of {interval} steps would have "
                "no effect; leave it out."
            )
        events = {
            step + epoch * per_epoch: injection
            for epoch in range(epochs)
            for injection, step in schedule.steps.items()
        }
        last = max(schedule.steps.values())
        if last > per_epoch:
            raise DataError(
                f"The schedule has a row at step {last}, but an epoch has {per_epoch} steps; move "
                "the row or train longer."
            )
        return events
    if interval is None:
        interval = per_epoch // count
        if interval < 1:
            raise DataError(
                f"{count} injections do not fit into {per_epoch} steps per epoch; train longer or "
                "inject less often."
            )
    elif interval < 1:
        raise DataError(f"The injection interval is {interval}; it must be at least 1 step.")
    if interval * count > num_steps:
        raise DataError(
            f"The schedule's injection {count} falls on step {interval * count} (every {interval} "
            f"steps), but the run has {num_steps} steps; shorten the interval or train longer."
        )
    return {
        interval * event: (event - 1) % count + 1 for event in range(1, num_steps // interval + 1)
    }


def _token_ids(
    text: ScheduledText,
    facts: Mapping[str, FactSet],
    tokenizer: Tokenizer | None,
    eos_token_id: int | None,
) -> np.ndarray:
    if text.token_ids is not None:
        return np.asarray(text.token_ids, dtype=np.int64)
    words = text.text
    if words is None:
        fact_set = facts.get(text.setting)
        if fact_set is None or text.instance >= len(fact_set.facts):
            raise DataError(
                f"{text.name} has neither text nor token ids, and no facts of that setting and "
                "instance were given; write the text or give the facts."
            )
        versions = fact_set.facts[text.instance].versions
        if text.version >= len(versions):
            raise DataError(
                f"{text.name}: the fact has only {len(versions)} versions, counted from 0."
            )
        words = versions[text.version]
    if tokenizer is None or eos_token_id is None:
        raise DataError(
            f"{text.name} is text; a tokenizer and its end-of-text id are needed to inject it."
        )
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    return np.asarray([*ids, eos_token_id], dtype=np.int64)


def _placement(texts: Sequence[ScheduledText], global_batch: int, spread: bool) -> list[int]:
    """The batch row of each text."""
    if spread:
        rows = [0] * len(texts)
        for row, members in enumerate(contiguous_groups(len(texts), global_batch)):
            for member in members:
                rows[member] = row
        return rows
    for text in texts:
        if text.row >= global_batch:
            raise DataError(
                f"{text.name} is beyond the batch of {global_batch} rows; use a larger batch, "
                "fewer texts, or 'spread: true' to divide them over all rows."
            )
    return [text.row for text in texts]


def plan_injections(
    schedule: Schedule,
    *,
    num_steps: int,
    global_batch: int,
    sequence_length: int,
    epochs: int = 1,
    interval: int | None = None,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | None = None,
    facts: Sequence[FactSet] = (),
    spread: bool | None = None,
) -> InjectionPlan:
    """Fit a schedule to a run, and refuse what cannot work before the first step.

    Args:
        schedule: from facts or from a file.
        num_steps: training steps of the whole run.
        global_batch: rows of the global batch.
        sequence_length: T.
        epochs: equal parts of ``num_steps`` after which the injections start again.
        interval: steps between injections; default: steps per epoch // injections (the paper's 160
            at 1,600 steps, 10 at 100).
        tokenizer: for rows without token ids.
        eos_token_id: appended to each tokenised text.
        facts: the source of texts for rows that have none.
        spread: divide the texts over all rows; default: as the schedule says, and only where the
            batch is below 128.

    Raises:
        DataError: a row beyond the batch or the step range, injected texts of a row longer than
            ``sequence_length``, or a text that cannot be found or tokenised.
    """
    if num_steps < 1 or epochs < 1 or global_batch < 1 or sequence_length < 1:
        raise DataError(
            f"num_steps is {num_steps}, epochs {epochs}, the global batch {global_batch} and the "
            f"sequence length {sequence_length}; all must be at least 1."
        )
    if spread is None:
        spread = schedule.spread and global_batch < SPREAD_BELOW
    by_setting = {fact_set.setting: fact_set for fact_set in facts}
    events = _events(schedule, num_steps, epochs, interval)
    rows: dict[int, dict[int, np.ndarray]] = {}
    placements: dict[int, tuple[tuple[ScheduledText, int, int], ...]] = {}
    for injection in sorted(set(events.values())):
        texts = schedule.at(injection)
        parts: dict[int, list[np.ndarray]] = {}
        entries = []
        for text, row in zip(texts, _placement(texts, global_batch, spread), strict=True):
            ids = _token_ids(text, by_setting, tokenizer, eos_token_id)
            parts.setdefault(row, []).append(ids)
            entries.append((text, row, len(ids)))
        rows[injection] = {row: np.concatenate(ids) for row, ids in parts.items()}
        placements[injection] = tuple(entries)
        for row, ids in rows[injection].items():
            if len(ids) > sequence_length:
                raise DataError(
                    f"Injection {injection} puts {len(ids)} injected tokens into row {row}, "
                    f"but a row has {sequence_length}; use longer rows, a larger batch, or fewer "
                    "or shorter texts."
                )
    return InjectionPlan(events, rows, placements, global_batch, sequence_length)
