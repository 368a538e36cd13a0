"""Pretraining end to end: what it leaves, what it skips, what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from tiny_studies import tiny_pretrain
from tiny_training import start_process

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.errors import ConfigError, DataError, ResultsError, UnsupportedArchitectureError
from ke_ray.models.loading import load_model
from ke_ray.studies.training import ModelShape
from ke_ray.training.initial import build_config, build_model
from ke_ray.training.loop import Progress
from ke_ray.training.parallel import Worker, lone_worker
from ke_ray.training.pretrain import run_pretrain


def test_a_series_is_left_that_loads_and_says_what_it_is(series: Path) -> None:
    refs = list_checkpoints(str(series / "checkpoints"))
    assert [ref.step for ref in refs] == [0, 2, 5, 10]
    assert len({ref.weights_fingerprint for ref in refs}) == 4
    for ref in refs:
        assert (Path(ref.location) / "tokenizer.json").is_file()
    first, last = (load_model(ref.location) for ref in (refs[0], refs[-1]))
    assert first.config.model_type == "olmo"
    assert not torch.equal(first.model.embed_tokens.weight, last.model.embed_tokens.weight)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(refs[-1].location)
    assert tokenizer.eos_token_id == last.config.eos_token_id == 0

    table = parquet.read_table(series / "train.parquet")
    assert table.column("step").to_pylist() == list(range(1, 11))
    losses = table.column("loss").to_pylist()
    assert losses[-1] < losses[0]
    assert table.column("num_tokens").to_pylist()[-1] == 10 * 8 * 48
    manifest = json.loads((series / "manifest.json").read_text())
    assert manifest["kind"] == "pretrain"
    assert manifest["status"] == "finished"
    assert manifest["checkpoint_steps"] == [0, 2, 5, 10]
    assert not (series / "state").exists()


def test_a_finished_study_is_skipped_and_another_one_is_refused(series: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in series.rglob("*") if p.is_file()}
    shown: list[Progress] = []
    again = run_pretrain(tiny_pretrain(series, micro_batch_size=4), shown.append)
    assert again.num_skipped == 1
    assert shown == []
    assert {p: p.stat().st_mtime_ns for p in series.rglob("*") if p.is_file()} == before
    with pytest.raises(ResultsError, match="optimizer.learning_rate was"):
        run_pretrain(tiny_pretrain(series, optimizer={"learning_rate": 0.02}))


def _die_at(output: str, step: int) -> None:
    torch.set_num_threads(1)

    def die(progress: Progress) -> None:
        if progress.record.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_pretrain(tiny_pretrain(Path(output), save_every=2), die)


def test_a_killed_pretraining_goes_on_and_ends_alike(tmp_path: Path, series: Path) -> None:
    process = start_process(_die_at, str(tmp_path), 8)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "state" / "step00000006").is_dir()
    kept = (tmp_path / "checkpoints" / "step5" / "model.safetensors").stat().st_mtime_ns
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shown: list[int] = []
    try:
        outcome = run_pretrain(
            tiny_pretrain(tmp_path, save_every=2), lambda p: shown.append(p.record.step)
        )
        alone = run_pretrain(tiny_pretrain(tmp_path / "alone"))
    finally:
        torch.set_num_threads(threads)
    assert outcome.num_done == 1
    assert shown[0] == 7
    assert (tmp_path / "checkpoints/step5/model.safetensors").stat().st_mtime_ns == kept
    ours = (tmp_path / "checkpoints/step10/model.safetensors").read_bytes()
    assert ours == (tmp_path / "alone/checkpoints/step10/model.safetensors").read_bytes()
    assert outcome.final_loss == alone.final_loss
    assert parquet.read_table(tmp_path / "train.parquet").num_rows == 10


def test_a_corpus_below_one_batch_is_refused_before_training(tmp_path: Path) -> None:
    study = tiny_pretrain(tmp_path, global_batch_size=512)
    with pytest.raises(DataError, match="has 512 rows, but"):
        run_pretrain(study)
    assert not (tmp_path / "checkpoints").exists()
    # The same folder with other data starts from nothing: no tokenizer of the first attempt.
    data = {"biographies": {"num_people": 5}, "vocab_size": 300}
    run_pretrain(tiny_pretrain(tmp_path, data=data))
    assert load_model(tmp_path / "checkpoints" / "step10").config.vocab_size == 320
    assert 'num_people": 5' in (tmp_path / "world" / "world.json").read_text()


@pytest.mark.parametrize(
    "kind", ["olmo", "olmo2", "llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "phi"]
)
def test_every_supported_architecture_can_be_trained_from_scratch(kind: str) -> None:
    architecture = ModelShape(model_type=kind, n_layers=1, d_model=16, d_mlp=24, n_heads=2)
    config = build_config(architecture, vocab_size=64, sequence_length=32, eos_token_id=0)
    model = build_model(config, seed=0)
    from ke_ray.models.layout import describe

    assert describe(model)[0].d_mlp == 24
    loss = model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss
    assert torch.isfinite(loss)
    same = build_model(config, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_unknown_models_and_keys_are_named() -> None:
    def build(**keys: object) -> None:
        values = {"n_layers": 1, "d_model": 16, "d_mlp": 24, "n_heads": 2, **keys}
        architecture = ModelShape.model_validate(values)
        build_config(architecture, vocab_size=64, sequence_length=32, eos_token_id=0)

    with pytest.raises(ConfigError, match="Did you mean 'olmo"):
        build(model_type="olmoo")
    with pytest.raises(ConfigError, match=r"'rms_norm_ep'.*Did you mean 'rms_norm_eps'"):
        build(model_type="llama", extra={"rms_norm_ep": 1})
    with pytest.raises(UnsupportedArchitectureError):
        build(model_type="jetmoe")


def test_one_worker_trains_on_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, asked, device in (
        (True, None, "cuda"),
        (True, False, "cpu"),
        (False, None, "cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        assert lone_worker(asked) == Worker(device=device)


def test_a_study_that_wants_a_gpu_does_not_start_without(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use_gpu is true.*entrypoint_num_gpus"):
        run_pretrain(tiny_pretrain(tmp_path, use_gpu=True))
    assert not (tmp_path / "tokenizer").exists()
