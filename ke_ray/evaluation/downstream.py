"""Zero-shot accuracy on lm-eval's tasks, of a model in memory: P and, from two of them, F.

    P = mean over tasks of accuracy        acc       SciQ, WinoGrande, ARC-Easy
                                           acc_norm  PIQA, HellaSwag, OpenBookQA
                                           (length-normalised)

Tasks, prompts and metrics are lm-eval's own. The items come from the Hub, or from a local folder
``<task>/validation.jsonl`` that replaces the dataset behind the same task definition and needs no
network. Local HellaSwag rows hold ``ctx`` and ``endings`` already cleaned, so lm-eval's cleaning
is replaced by one that only builds the query. On the Hub lm-eval evaluates the test split where a
task has one (SciQ, OpenBookQA, ARC-Easy); the local files are validation splits, like the paper's.

A multiple-choice task of one's own (JSON lines with ``context``, ``choices``, ``gold``) runs
through the same code.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ke_ray import storage
from ke_ray.config import validate
from ke_ray.data.facts import Text
from ke_ray.data.text_file import parse_json, read_text
from ke_ray.errors import DataError, nearest
from ke_ray.evaluation.lm import wrap_model
from ke_ray.evaluation.sharing import Workers
from ke_ray.storage.safe_yaml import parse_yaml

#: The tasks of P and the metric of each.
TASK_METRICS = {
    "sciq": "acc",
    "winogrande": "acc",
    "arc_easy": "acc",
    "piqa": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
}

_FOLDERS = {name: name for name in TASK_METRICS} | {"arc_easy": "arc"}
_COLUMNS = {
    "sciq": ("question", "support", "correct_answer", "distractor1", "distractor2", "distractor3"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}


@dataclass(frozen=True)
class DownstreamResult:
    """One task.

    Attributes:
        task: its name.
        metric: ``acc`` or ``acc_norm``.
        value: mean over items, a fraction.
        stderr: lm-eval's standard error of the mean; NaN for a single item.
        num_items: how many items were evaluated.
        items: 0.0 or 1.0 for each item in the data's order, so that two models can be paired.
    """

    task: str
    metric: str
    value: float
    stderr: float
    num_items: int
    items: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """A row of ``downstream.parquet``: task, metric, value, stderr, num_items."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            "num_items": self.num_items,
        }


class _Question(BaseModel):
    """An item of a task of one's own; further fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    context: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check_gold(self) -> Self:
        if self.gold >= len(self.choices):
            raise ValueError(
                f"'gold' is {self.gold}, expected the number of the right choice, 0 to "
                f"{len(self.choices) - 1}"
            )
        return self


def _read_rows(path: str) -> dict[str, Any]:
    """The rows of a JSON-lines file by name, file and line."""
    rows = {}
    for number, line in enumerate(read_text(path, "a task file").split("\n"), start=1):
        if line.strip():
            name = f"'{path}', line {number}"
            rows[name] = parse_json(line, name)
    if not rows:
        raise DataError(f"'{path}' has no items; write one per line.")
    return rows


def _dataset(rows: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
    """A task's data as lm-eval asks for them; its keyword arguments are the task's metadata."""
    from datasets import Dataset

    return {"validation": Dataset.from_list(rows)}


def _hellaswag_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The fields that lm-eval's cleaning makes, from a row whose texts are clean already."""
    return {
        "query": f"{row['activity_label']}: {row['ctx']}",
        "choices": row["endings"],
        "label": int(row["label"]),
    }


def _local_overrides(task: str, data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    by_name = _read_rows(storage.join(os.fspath(data_dir), task, "validation.jsonl"))
    for name, row in by_name.items():
        missing = [key for key in _COLUMNS[task] if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{name}: '{missing[0]}' is missing.")
    rows = list(by_name.values())
    is_clean = task == "hellaswag" and "ctx_a" not in rows[0]  # else lm-eval cleans its texts
    if is_clean:
        rows = [_hellaswag_fields(row) for row in rows]
    overrides = {
        "task": task,
        "custom_dataset": partial(_dataset, rows),
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    if is_clean:
        overrides["process_docs"] = None
    return overrides


def _own_task(name: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    rows = [
        validate(_Question, row, line, DataError).model_dump()
        for line, row in _read_rows(os.fspath(path)).items()
    ]
    definition = Path(__file__).parent / "tasks" / "multiple_choice.yaml"
    config: dict[str, Any] = parse_yaml(definition.read_text(encoding="utf-8"), str(definition))
    return config | {"task": name, "custom_dataset": partial(_dataset, rows)}


def load_tasks(
    tasks: Sequence[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    own_tasks: Mapping[str, str | os.PathLike[str]] | None = None,
) -> dict[str, Any]:
    """lm-eval's task objects, ready for ``lm_eval.evaluate``; zero-shot.

    Args:
        tasks: names out of ``TASK_METRICS``.
        data_dir: folder with ``<task>/validation.jsonl``; None: the Hub.
        own_tasks: name -> JSON-lines file of further multiple-choice tasks.

    Raises:
        DataError: an unknown task, or data that are missing or not valid.
    """
    own_tasks = own_tasks or {}
    for task in tasks:
        if task not in TASK_METRICS:
            hint = nearest(task, TASK_METRICS) or f" Valid tasks: {', '.join(TASK_METRICS)}."
            raise DataError(f"There is no downstream task '{task}'.{hint}")
    names = [*tasks, *own_tasks]
    if not names or len(set(names)) < len(names):
        raise DataError(f"The downstream tasks are {names}; give at least one, and each only once.")
    specs = [task if data_dir is None else _local_overrides(task, data_dir) for task in tasks]
    own = [_own_task(name, path) for name, path in own_tasks.items()]

    import lm_eval.tasks  # after the checks: its import takes seconds

    root = Path(lm_eval.tasks.__file__).parent
    # Only the folders that are needed: the index of all tasks takes ten seconds.
    folders = [str(root / _FOLDERS[task]) for task in tasks]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    try:
        # A group's members may override fields of registered tasks: here, the data.
        members = manager.load({"group": "ke_ray_downstream", "task": specs}) if specs else {}
        loaded = dict(members.get("tasks", {})) | (manager.load(own)["tasks"] if own else {})
    except Exception as error:  # the Hub, datasets and prompt templates raise many kinds
        source = "the Hub" if data_dir is None and not own_tasks else "the given files"
        raise DataError(
            f"The data of {', '.join(names)} cannot be loaded from {source} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give local files "
            "with the columns of the original data."
        ) from error
    for task in loaded.values():
        task.set_config(key="num_fewshot", value=0)
    return {name: loaded[name] for name in names}


def _check_items(tasks: Mapping[str, Any], limit: int | None) -> None:
    """Raise a ``DataError`` for the first item of which lm-eval cannot make a prompt."""
    for name, task in tasks.items():
        for number, doc in task.doc_iterator(limit=limit):
            try:
                task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)
            except Exception as error:
                raise DataError(
                    f"Item {number + 1} of the data of {name} does not fit the task's prompt "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); correct or "
                    "remove it."
                ) from error


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Switch off lm-eval's progress bars and warnings, which would break into the caller's output,
    and restore Python's random state, which loading tasks advances."""
    import lm_eval.api.task as task_module

    logger = logging.getLogger("lm_eval")
    level, bars, state = logger.level, task_module.tqdm, random.getstate()
    logger.setLevel(logging.ERROR)
    task_module.tqdm = partial(bars, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bars
        random.setstate(state)


def run_downstream(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = tuple(TASK_METRICS),
    *,
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_tokens: int | None = None,
    own_tasks: Mapping[str, str | os.PathLike[str]] | None = None,
    language_model: Callable[[Any, Any], Any] | None = None,
    workers: Workers | None = None,
) -> list[DownstreamResult]:
    """Evaluate a model in memory, zero-shot.

    Args:
        model: a causal language model of transformers; its mode (train, eval) is restored.
        tokenizer: of transformers, or a ``tokenizers.Tokenizer``.
        tasks: names out of ``TASK_METRICS``; may be empty if there are own tasks.
        data_dir: folder with ``<task>/validation.jsonl``; None: the Hub.
        limit: the first items of each task only.
        batch_tokens, workers: as ``spans.score_spans``.
        own_tasks: name -> JSON-lines file (``context``, ``choices``, ``gold``); metric ``acc``.
        language_model: (model, tokenizer) -> lm-eval model, in place of our own; for comparisons.

    Returns:
        one result per task, in the order of ``tasks`` and then ``own_tasks``.

    Raises:
        DataError: an unknown task, a limit below 1, or data that are missing or not valid.
    """
    if limit is not None and limit < 1:
        raise DataError(f"The limit of items is {limit}; it must be at least 1 or null.")
    from lm_eval import evaluator

    with _quiet_lm_eval():
        loaded = load_tasks(tasks, data_dir=data_dir, own_tasks=own_tasks)
        if language_model is None:
            lm = wrap_model(model, tokenizer, batch_tokens=batch_tokens, workers=workers)
        else:
            lm = language_model(model, tokenizer)
        try:
            output = evaluator.evaluate(lm, {"tasks": loaded}, limit=limit, bootstrap_iters=100)
        except Exception:
            _check_items(loaded, limit)
            raise
    results = []
    for task in loaded:
        metric = TASK_METRICS.get(task, "acc")
        samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
        stderr = output["results"][task][f"{metric}_stderr,none"]
        results.append(
            DownstreamResult(
                task,
                metric,
                float(output["results"][task][f"{metric},none"]),
                float(stderr) if isinstance(stderr, int | float) else float("nan"),
                len(samples),
                tuple(float(sample[metric]) for sample in samples),
            )
        )
    return results
