"""Measurements of a live model as a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ke_ray.callbacks.monitor import Monitor, ending
from ke_ray.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        # One code under two names, which do not know each other's classes.
        if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError as error:
        raise UserError(
            "LightningMonitor needs Lightning, which is not installed here: "
            "pip install 'ke-ray[lightning]'."
        ) from error

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LightningMonitor(Callback):
    """Measures the model every n steps and at the start, and logs to the trainer's loggers.

    ::

        monitor = LightningMonitor(ids, "runs/entropy", tokens_per_step=65_536)
        lightning.Trainer(callbacks=[monitor], …).fit(module, loader)

    Args:
        data, output: as for :class:`~ke_ray.callbacks.monitor.Monitor`.
        settings: the others that it takes. By default, ``autocast`` is that of the trainer's
            mixed precision.

    Raises:
        DataError, UserError: as ``Monitor``; when training starts, as ``Monitor.start``.
    """

    def __init__(self, data: Any, output: str | Path, **settings: Any) -> None:
        self.monitor = Monitor(data, output, **settings)
        self._is_precision_given = "autocast" in settings

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start, and measure the model as it is."""
        if not self._is_precision_given:
            self.monitor.autocast = _MIXED.get(str(trainer.precision))
        self.monitor.start(pl_module, trainer.global_step)
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Measure where it is time to; several batches may make one step."""
        self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the result folder."""
        self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the result folder, which then says how training ended."""
        self.monitor.close(ending(type(exception)))

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        # Not through `pl_module.log`, which would keep what comes between its own intervals.
        if metrics := self.monitor(pl_module, trainer.global_step):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
