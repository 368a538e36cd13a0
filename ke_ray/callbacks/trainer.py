"""Measurements of a live model as a callback of transformers' ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ke_ray.callbacks.monitor import Monitor, undisturbed

_NUM_ROWS = 64  # whose lengths tell the tokens of a step


class TrainerMonitor(TrainerCallback):
    """Measures the model every n steps and at the start, and logs what ``Trainer`` reports to.

    ::

        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        trainer.add_callback(TrainerMonitor(trainer, ids, "runs/entropy"))
        trainer.train()

    Args:
        trainer: whose ``log`` passes the values on to W&B, TensorBoard, MLflow and its history;
            callbacks have no other way there.
        data, output: as for :class:`~ke_ray.callbacks.monitor.Monitor`.
        settings: the others that it takes. By default, ``tokens_per_step`` is that of the first
            rows of the data set, ``autocast`` that of ``bf16`` and ``fp16``, and ``run`` is
            ``run_name``.

    Raises:
        DataError, UserError: as ``Monitor``; when training begins, as ``Monitor.start``.
    """

    def __init__(self, trainer: Trainer, data: Any, output: str | Path, **settings: Any) -> None:
        args = trainer.args
        mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        settings = {"autocast": mixed, "run": args.run_name, **settings}
        if "tokens_per_step" not in settings:
            settings["tokens_per_step"] = _tokens_per_step(trainer)
        self.trainer, self.monitor = trainer, Monitor(data, output, **settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start, and measure the model as it is."""
        self.monitor.start(self.trainer.model, state.global_step)
        self._measure(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure where it is time to."""
        self._measure(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the result folder."""
        self.monitor.close()

    def _measure(self, state: TrainerState) -> None:
        if metrics := self.monitor(self.trainer.model, state.global_step):
            self.trainer.log(metrics)


def _tokens_per_step(trainer: Trainer) -> int | None:
    """Tokens of one step over all workers; None where the data set does not show its rows."""
    dataset: Any = trainer.train_dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return None  # a stream, which a look would use up
    try:
        with undisturbed(torch.device("cpu")):  # rows may be cut or masked at random
            rows = [dataset[number] for number in range(min(len(dataset), _NUM_ROWS))]
        lengths = [len(row["input_ids"]) for row in rows]
    except (LookupError, TypeError, NotImplementedError):
        return None
    args = trainer.args
    num_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return round(num_rows * sum(lengths) / len(lengths)) if lengths else None
