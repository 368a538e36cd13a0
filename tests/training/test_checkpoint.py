"""Training states: a killed run goes on bitwise, whatever was left behind."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tiny_training import (
    run_together,
    run_workers,
    start_worker,
    tiny_keys,
    tiny_model,
    tiny_rows,
)
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ke_ray import storage
from ke_ray.checkpoints.formats.shards import StateFile
from ke_ray.errors import StorageError, TrainingError
from ke_ray.studies.training import OptimizerSettings
from ke_ray.training.checkpoint import States, TrainingState
from ke_ray.training.loop import train
from ke_ray.training.optimizer import build_optimizer
from ke_ray.training.parallel import Worker, wrap_model

KEYS = {"save_every": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run_workers(tmp_path_factory.mktemp("undisturbed"), 1, keys=KEYS, dropout=0.2)


def kill(folder: Path, **how: Any) -> None:
    worker = start_worker(
        keys=KEYS,
        dropout=0.2,
        state_uri=str(folder / "states"),
        out=str(folder / "never.npz"),
        **how,
    )
    worker.join(timeout=120)
    assert worker.exitcode == -signal.SIGKILL
    assert not (folder / "never.npz").exists()


def resume(folder: Path) -> dict[str, np.ndarray]:
    return run_workers(folder, 1, keys=KEYS, dropout=0.2, state_uri=str(folder / "states"))


def assert_bitwise(resumed: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in expected:
        if name.startswith("weight") or name == "loss":
            np.testing.assert_array_equal(resumed[name], expected[name], err_msg=name)
    assert len(resumed["loss"]) == 12  # rows recorded before the kill are there once


def whole_states(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("states/*/state.json"))


@pytest.mark.parametrize("method", ["write_data", "finish"])
def test_a_kill_in_the_middle_of_a_save_goes_back_to_the_last_whole_state(
    method: str, tmp_path: Path, undisturbed: dict[str, np.ndarray]
) -> None:
    kill(tmp_path, die_in_save=(3, method))  # of step 9, while training goes on
    assert whole_states(tmp_path) == ["step00000003", "step00000006"]
    assert (tmp_path / "states" / "step00000009").is_dir()
    assert_bitwise(resume(tmp_path), undisturbed)
    assert whole_states(tmp_path) == ["step00000009", "step00000012"]


def test_half_written_states_are_passed_over(
    tmp_path: Path, undisturbed: dict[str, np.ndarray]
) -> None:
    run_workers(tmp_path, 1, keys=KEYS, dropout=0.2, state_uri=str(tmp_path / "states"))
    newest = tmp_path / "states" / "step00000012" / "shard-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-40])
    (tmp_path / "states" / "step00000013").mkdir()  # a kill before state.json was written
    assert_bitwise(resume(tmp_path), undisturbed)


def test_states_of_version_1_are_read(tmp_path: Path, undisturbed: dict[str, np.ndarray]) -> None:
    kill(tmp_path, die_in_save=(3, "finish"))
    folder = tmp_path / "states" / "step00000006"
    tensors = load_file(folder / "shard-00001.safetensors")
    files: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    for name, tensor in tensors.items():
        kind = "optimizer" if "::" in name else "rng" if name.startswith("rank") else "model"
        files[kind][name] = tensor
    (folder / "shard-00001.safetensors").unlink()
    for kind, part in files.items():
        save_file(part, folder / f"{kind}.safetensors")
    meta = json.loads((folder / "state.json").read_text()) | {"state_version": 1}
    meta["sizes"] = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "state.json"}
    (folder / "state.json").write_text(json.dumps(meta))
    assert_bitwise(resume(tmp_path), undisturbed)


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "states")
    keys = tiny_keys(save_every=2)
    train(tiny_model(), tiny_rows(), keys, num_steps=4, state_uri=uri, identity="a")
    with pytest.raises(TrainingError, match="another study"):
        train(tiny_model(), tiny_rows(), keys, num_steps=4, state_uri=uri, identity="b")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    uri, keys = str(tmp_path / "states"), tiny_keys()
    train(tiny_model(), tiny_rows(), keys, num_steps=2, state_uri=uri)
    wider = tiny_model(intermediate_size=48)
    before = {name: p.clone() for name, p in wider.named_parameters()}
    with pytest.raises(TrainingError, match=r"step00000002' is of another model.*mlp") as error:
        train(wider, tiny_rows(), keys, num_steps=4, state_uri=uri)
    assert "another output folder" in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in wider.named_parameters())


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="states"):
        train(tiny_model(), tiny_rows(), tiny_keys(), num_steps=4, state_uri=f"{tmp_path}/states")


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [1, 4]), (None, [4])])
def test_states_are_saved_by_time_as_well_as_by_step(
    minutes: float | None, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(States, "save", lambda self, state, *_: saved.append(state.step))
    monkeypatch.setattr(
        States, "is_due", lambda self, s, due=States.is_due: due(self, s) and not saved
    )
    keys = tiny_keys(save_every=100, save_every_minutes=minutes)
    train(tiny_model(), tiny_rows(), keys, num_steps=4, state_uri="memory://states-by-time")
    assert saved == steps


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_states_go_to_any_store_and_old_ones_are_removed(
    store: str, request: pytest.FixtureRequest
) -> None:
    folder = "memory://states" if store == "memory" else request.getfixturevalue("s3")
    uri = storage.join(folder, "states-of-a-test")
    keys = tiny_keys(save_every=1)
    whole = train(tiny_model(), tiny_rows(), keys, num_steps=6)
    train(tiny_model(), tiny_rows(), keys, num_steps=6, state_uri=uri, identity="m")
    assert storage.list_dir(uri) == ["step00000005", "step00000006"]
    # As if the run had been killed before its end; the model's weights are replaced by the state's.
    storage.remove(storage.join(uri, "step00000006"))
    model = tiny_model(seed=9)
    again = train(model, tiny_rows(), keys, num_steps=6, state_uri=uri, identity="m")
    assert [r["loss"] for r in again.records["train"]] == [
        r["loss"] for r in whole.records["train"]
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_a_state_in_a_store_out_of_order_is_waited_for_and_a_short_one_is_not(
    whole: bool, s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = storage.join(s3, f"states-and-outages-{whole}")
    keys = tiny_keys(save_every=1)
    train(tiny_model(), tiny_rows(), keys, num_steps=3, state_uri=uri)
    storage.remove(storage.join(uri, "step00000003"))  # as if it had been killed before its end
    outages = []

    class Reluctant(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            if whole and len(outages) < 2:
                outages.append(1)
                raise OSError(errno.EBUSY, "SlowDown")
            return super().read(*args)

        def readinto(self, buffer: Any) -> int:
            return super().readinto(buffer) if whole else 0

    monkeypatch.setattr(storage, "open_read", lambda path: Reluctant(storage.read_bytes(path)))
    if whole:
        train(tiny_model(), tiny_rows(), keys, num_steps=3, state_uri=uri)
        assert len(outages) == 2
        assert "damaged" not in caplog.text
    else:
        with pytest.raises(TrainingError, match="ends early"):
            train(tiny_model(), tiny_rows(), keys, num_steps=3, state_uri=uri)


def reshard(folder: Path, strategies: list[str], config: dict[str, Any]) -> None:
    """Twelve steps with 4, 2, 1 and 3 workers, three each, equal those of one worker."""
    keys = {"global_batch_size": 12, "save_every": 3}
    alone = run_workers(folder, 1, keys=keys, config=config)
    size = sum(value.nbytes for name, value in alone.items() if name.startswith("weight"))
    for i, (world_size, strategy) in enumerate(zip((4, 2, 1, 3), strategies, strict=True)):
        resumed = run_workers(
            folder,
            world_size,
            keys={**keys, "num_workers": world_size, "strategy": strategy},
            config=config,
            state_uri=str(folder / "states"),
            **({"stop_after": 3 * i + 4} if i < 3 else {}),
        )
        meta = json.loads((folder / f"states/step{3 * i + 3:08d}/state.json").read_text())
        assert meta["world_size"] == world_size
        if i and strategy == "fsdp":  # weights and two moments, and some numbers
            share = 3 * size / world_size
            assert share * 0.8 < resumed["bytes_read"] < share * 1.2 + 20_000
    np.testing.assert_allclose(resumed["loss"], alone["loss"], atol=2e-6)
    for name in (n for n in alone if n.startswith("weight")):
        np.testing.assert_allclose(resumed[name], alone[name], atol=5e-6, err_msg=name)


def test_grouped_queries_are_read_by_other_numbers_of_workers(tmp_path: Path) -> None:
    # Two rows of keys: the third of three workers has none.
    grouped = {"num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": False}
    reshard(tmp_path, ["fsdp", "ddp", "ddp", "fsdp"], grouped)


@pytest.mark.slow
def test_tied_embeddings_are_read_by_other_numbers_of_workers(tmp_path: Path) -> None:
    reshard(tmp_path, ["ddp", "fsdp", "ddp", "ddp"], {})


def save_twice(worker: Worker, uri: str) -> dict[str, Any]:
    """Peaks of host memory in bytes, of saving and of loading a shard, with its size."""
    model = tiny_model(hidden_size=256, vocab_size=16384)
    wrapped = wrap_model(model, worker, strategy="fsdp", precision="float32")
    optimizer = build_optimizer(wrapped, OptimizerSettings())
    for parameter in wrapped.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    shard = 3 * sum(p.to_local().nbytes for p in wrapped.parameters())  # type: ignore[attr-defined]
    peaks = {}
    with closing(States(uri, worker, identity="")) as states:
        for step in (1, 2):  # what is loaded and made once counts in the first
            before = _reset_peak()
            states.save(TrainingState(step), wrapped, optimizer)
            states.wait()
            peaks["saving"] = _peak() - before
        optimizer.state.clear()
        before = _reset_peak()
        assert states.load(wrapped, optimizer) is not None
        peaks["loading"] = _peak() - before
    return {"shard": shard, **peaks}


def _reset_peak() -> int:
    ctypes.CDLL(None).malloc_trim(
        0
    )  # memory that is free, but still the process's, would not count
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_saving_and_loading_hold_two_shards_at_most_and_torch_reads_the_files(
    tmp_path: Path,
) -> None:
    for numbers in run_together(tmp_path / "run", 2, save_twice, str(tmp_path / "states")):
        assert isinstance(numbers, dict), numbers
        assert numbers["shard"] > 20e6
        assert 0.9 * numbers["shard"] < numbers["saving"] < 2 * numbers["shard"]
        assert numbers["loading"] < 2 * numbers["shard"]
    folder = tmp_path / "states" / "step00000002"
    names = sorted(path.name for path in folder.iterdir())
    shards = ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert names == ["records.json", *shards, "state.json"], "and no pickle"
    expected = tiny_model(hidden_size=256, vocab_size=16384)
    tensors = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    moments = {f"{name}::exp_avg": torch.ones_like(p) for name, p in expected.named_parameters()}
    dcp.load(tensors | moments, storage_reader=HuggingFaceStorageReader(str(folder)))
    for name, parameter in expected.named_parameters():
        assert not moments[f"{name}::exp_avg"].any()
        torch.testing.assert_close(tensors[name], parameter.detach(), atol=1e-3, rtol=1e-3)
    weights = StateFile(folder)  # as a checkpoint
    assert set(weights.keys()) == set(tensors)
    assert all(torch.equal(weights.get_tensor(name), tensors[name]) for name in tensors)
