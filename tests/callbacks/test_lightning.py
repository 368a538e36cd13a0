"""A monitor as a callback of Lightning's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_training import tiny_model, tiny_rows

from ke_ray.callbacks import LightningMonitor
from ke_ray.results.scan_folder import ScanFolder

lightning = pytest.importorskip("lightning")
CSVLogger = pytest.importorskip("lightning.pytorch.loggers").CSVLogger

D = tiny_rows(num_instances=4).ids
ROWS = torch.from_numpy(tiny_rows(seed=1).ids).long()
SETTINGS: dict[str, Any] = {"every": 2, "tokens_per_step": 4 * 12, "max_share": 1.0}


class Module(lightning.LightningModule):
    """A model of transformers, with dropout, as users of Lightning train it."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.model = tiny_model()
        self.fails_at = fails_at
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.2

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the batch is broken")
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    folder: Path, monitor: LightningMonitor | None, module: Module, steps: int, **keys: Any
) -> None:
    lightning.seed_everything(5, verbose=False)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        logger=CSVLogger(folder, "log", ""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor] if monitor else [],
    )
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, shuffle=True)
    trainer.fit(module, loader, **keys)
    trainer.save_checkpoint(folder / "last.ckpt")


def steps_of(folder: Path) -> list[int]:
    return sorted(set(ScanFolder.open(str(folder)).entropy()["step"].to_pylist()))


def test_values_reach_the_loggers_and_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    alone, module = Module(), Module()
    fit(tmp_path / "alone", None, alone, 4)
    monitor = LightningMonitor(D, tmp_path / "live", measures="knowledge_entropy,gini", **SETTINGS)
    fit(tmp_path / "out", monitor, module, 4)
    expected, found = alone.state_dict(), module.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    table = pd.read_csv(tmp_path / "out" / "log" / "metrics.csv")
    logged = table.dropna(subset=["knowledge_entropy/total_nats"])
    assert list(logged.step) == [0, 2, 4] == steps_of(tmp_path / "live")
    assert logged["knowledge_entropy/gini/layer_01_fraction"].notna().all()
    assert ScanFolder.open(str(tmp_path / "live")).manifest["status"] == "finished"


def test_a_run_that_fails_says_so_and_resumes(tmp_path: Path) -> None:
    live = tmp_path / "live"
    fit(tmp_path / "out", LightningMonitor(D, live, **SETTINGS), Module(), 2)
    with pytest.raises(RuntimeError, match="the batch is broken"):
        fit(
            *(tmp_path / "again", LightningMonitor(D, live, **SETTINGS), Module(fails_at=5), 8),
            ckpt_path=tmp_path / "out" / "last.ckpt",
        )
    assert ScanFolder.open(str(live)).manifest["status"] == "failed"
    assert steps_of(live) == [0, 2, 4]
    fit(
        *(tmp_path / "third", LightningMonitor(D, live, **SETTINGS), Module(), 6),
        ckpt_path=tmp_path / "out" / "last.ckpt",
    )
    assert steps_of(live) == [0, 2, 4, 6]
    assert ScanFolder.open(str(live)).manifest["status"] == "finished"
