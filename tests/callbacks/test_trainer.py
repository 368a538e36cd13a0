"""A monitor as a callback of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import tiny_model, tiny_rows
from transformers import Trainer, TrainingArguments

from ke_ray.callbacks import TrainerMonitor
from ke_ray.errors import ConfigError, ResultsError
from ke_ray.results.scan_folder import ScanFolder

D = tiny_rows(num_instances=4).ids
ROWS = [{"input_ids": row, "labels": row} for row in tiny_rows(seed=1).ids.astype(int).tolist()]


def trainer_of(folder: Path, max_steps: int, dataset: Any = ROWS, **arguments: Any) -> Trainer:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=4,
        logging_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        **{"report_to": "none", "seed": 5, **arguments},
    )
    return Trainer(model=model, args=args, train_dataset=dataset)


def measured(trainer: Trainer, output: Path, **settings: Any) -> Trainer:
    settings = {"every": 2, "max_share": 1.0, **settings}
    trainer.add_callback(TrainerMonitor(trainer, D, output, **settings))
    return trainer


def steps_of(folder: Path) -> list[int]:
    return sorted(set(ScanFolder.open(str(folder)).entropy()["step"].to_pylist()))


def test_values_reach_what_the_trainer_reports_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(tmp_path / "out", 4, report_to="tensorboard")
    measured(trainer, tmp_path / "live", measures=["knowledge_entropy", "gini"])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "knowledge_entropy/total_nats" in row]
    assert [row["step"] for row in logged] == [0, 2, 4] == steps_of(tmp_path / "live")
    assert {"knowledge_entropy/layer_00_nats", "knowledge_entropy/gini/total_fraction"} <= set(
        logged[0]
    )
    (events,) = (tmp_path / "board").rglob("events*")
    assert b"knowledge_entropy/total_nats" in events.read_bytes()
    # 2 rows × 2 micro-batches × 12 tokens a step; a measurement is a third of 48 tokens' step.
    assert "of 48 tokens takes as long as 0.33 steps of 48 tokens" in capsys.readouterr().err
    rows = ScanFolder.open(str(tmp_path / "live")).entropy()
    assert set(rows["tokens"].to_pylist()) == {0, 96, 192}


def test_training_is_the_same_to_the_bit_and_a_resumed_run_appends(tmp_path: Path) -> None:
    alone = trainer_of(tmp_path / "alone", 8)
    alone.train()
    expected = alone.model.state_dict()
    first = measured(trainer_of(tmp_path / "out", 8), tmp_path / "live")
    first.train()
    found = first.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    resumed = measured(trainer_of(tmp_path / "out", 8), tmp_path / "live")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert steps_of(tmp_path / "live") == [0, 2, 4, 6, 8]
    rows = ScanFolder.open(str(tmp_path / "live")).entropy().to_pandas()
    assert not rows.duplicated(["checkpoint", "layer", "measure"]).any()
    # From its start again it is another run.
    with pytest.raises(ResultsError, match="another run, up to step 8"):
        measured(trainer_of(tmp_path / "out", 8), tmp_path / "live").train()


def test_the_interval_keeps_within_one_per_cent_unless_told_otherwise(tmp_path: Path) -> None:
    trainer = measured(trainer_of(tmp_path / "out", 2), tmp_path / "live", every=None)
    trainer.callback_handler.callbacks[-1].monitor.max_share = 0.01
    trainer.train()
    cost = ScanFolder.open(str(tmp_path / "live")).manifest["cost"]
    assert cost["every"] == 34  # 48 tokens of a forward pass beside 48 of a step: 1/3 of 1/34
    assert cost["forecast_share"] <= 0.01
    assert steps_of(tmp_path / "live") == [0]


def test_a_stream_has_to_say_how_long_its_rows_are(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(ROWS)

    trainer = measured(trainer_of(tmp_path / "out", 2, Stream()), tmp_path / "live")
    with pytest.raises(ConfigError, match="Give the number of tokens of one training step"):
        trainer.train()
    trainer = trainer_of(tmp_path / "out", 2, Stream())
    measured(trainer, tmp_path / "live", tokens_per_step=48).train()
    assert steps_of(tmp_path / "live") == [0, 2]


def test_mixed_precision_is_that_of_training(tmp_path: Path) -> None:
    trainer = measured(trainer_of(tmp_path / "out", 2, bf16=True), tmp_path / "live")
    trainer.train()
    identity = ScanFolder.open(str(tmp_path / "live")).manifest["identity"]
    assert (identity["dtype"], identity["autocast"]) == ("float32", "bfloat16")
