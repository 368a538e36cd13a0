"""What the evaluations of a continual-learning run cost beside its training.

In tokens that pass forwards, of which each costs a third of a training token (2 operations a weight
in place of 6). Nothing is fetched, tokenised or written: what is not on this machine is taken to be
as large as the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ke_ray import storage
from ke_ray.data.facts import Fact, FactSet, load_facts
from ke_ray.errors import KeRayError
from ke_ray.studies.continual import ContinualStudy

#: Items that lm-eval takes from the Hub, and the tokens of one: its context once and its choices
#: (measured with OLMo's tokenizer on 100 items each).
_TASKS = {
    "sciq": (1000, 113),
    "winogrande": (1267, 23),
    "arc_easy": (2376, 40),
    "piqa": (1838, 51),
    "hellaswag": (10042, 153),
    "openbookqa": (500, 22),
}
#: Of a probe in the same count; the paper's facts, and their injections.
_TOKENS_PER_PROBE = 26
_PROBES_PER_FACT = 15
_NUM_FACTS = {"paraphrase": 70, "once": 60}
_NUM_INJECTIONS = 10
#: Of an item of one's own (assumed).
_TOKENS_PER_ITEM = 40


@dataclass(frozen=True)
class EvaluationCost:
    """Tokens of forward passes in one run.

    Attributes:
        num_probings: how often the facts are probed.
        probes, tasks, perplexity, entropy: tokens, over the whole run.
        share: of training's operations, all together.
    """

    num_probings: int
    probes: int
    tasks: int
    perplexity: int
    entropy: int
    share: float

    def __str__(self) -> str:
        """One line of a dry run."""
        parts = {
            f"probes {self.num_probings} times": self.probes,
            "tasks": self.tasks,
            "perplexity": self.perplexity,
            "knowledge entropy": self.entropy,
        }
        total = sum(parts.values())
        text = ", ".join(f"{name} {value:,}" for name, value in parts.items() if value)
        return (
            f"evaluation: about {self.share:.1%} of training's operations on top; "
            f"{total:,} tokens per run, forwards only" + (f" ({text})" if text else "")
        )


def evaluation_cost(study: ContinualStudy, num_tokens: int) -> EvaluationCost:
    """The cost of a run's evaluations.

    Args:
        num_tokens: of the run's training; at least one step.
    """
    num_steps = num_tokens // (study.global_batch_size * study.sequence_length)
    # Before and after training; a start that is resuscitated, also as it was.
    num_snapshots = 3 if study.resuscitation else 2
    facts = _facts(study)
    num_probes = sum(
        len(pairs) for each in facts for fact in each.facts for pairs in fact.probes.values()
    )
    steps = study.probes.resolve(_injection_steps(study, num_steps, facts), num_steps)
    # The last step is probed twice: as one of the run's, and with all else after it.
    num_probings = len(steps) - 1 + num_snapshots if num_probes else 0
    perplexity, entropy = (
        text.num_instances * (text.sequence_length or study.sequence_length) if text else 0
        for text in (study.held_out, study.entropy)
    )
    settings = study.resuscitation
    is_measured = (
        settings is not None
        and settings.coefficients is None
        and settings.control != "attention_temperature"
    )
    perplexity *= num_snapshots
    entropy *= num_snapshots + is_measured  # once more for the coefficients
    tasks = num_snapshots * sum(_task_tokens(study))
    probes = num_probings * num_probes * _TOKENS_PER_PROBE
    share = 2 * (probes + tasks + perplexity + entropy) / (6 * num_tokens)
    return EvaluationCost(num_probings, probes, tasks, perplexity, entropy, share)


def _injection_steps(study: ContinualStudy, num_steps: int, facts: Sequence[FactSet]) -> range:
    if study.injection is None:
        return range(0)
    versions = [len(fact.versions) for each in facts for fact in each.facts]
    count = study.injection.count or max(versions, default=_NUM_INJECTIONS)
    every = study.injection.every or max(1, num_steps // study.epochs // count)
    return range(every, num_steps + 1, every)


def _facts(study: ContinualStudy) -> list[FactSet]:
    """The facts of a study, or as many of the paper's size."""
    fact = Fact(("",) * _NUM_INJECTIONS, {"all": (("", ""),) * _PROBES_PER_FACT})
    sets = []
    for setting, count in _NUM_FACTS.items():
        path = getattr(study.injection, setting, None)
        if path is None:
            continue
        facts = FactSet(setting, (fact,) * count)
        if storage.is_local(path) and storage.exists(path):
            with suppress(KeRayError):  # what is wrong is said where they are read in earnest
                facts = load_facts(path, setting)
        limit = getattr(study.injection, f"limit_{setting}")
        sets.append(replace(facts, facts=facts.facts[:limit]))
    return sets


def _task_tokens(study: ContinualStudy) -> Iterator[int]:
    if (downstream := study.downstream) is None:
        return
    for task in downstream.tasks:
        count, tokens = _TASKS[task]
        if downstream.data is not None:
            count = _num_lines(storage.join(downstream.data, task, "validation.jsonl"), count)
        yield min(count, downstream.limit or count) * tokens
    for path in downstream.own_tasks.values():
        count = _num_lines(path, 0)
        yield min(count, downstream.limit or count) * _TOKENS_PER_ITEM


def _num_lines(path: str, otherwise: int) -> int:
    if not (storage.is_local(path) and storage.exists(path)):
        return otherwise
    return sum(1 for line in storage.read_bytes(path).splitlines() if line.strip())
