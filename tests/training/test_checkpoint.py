"""Training states: a killed run goes on bitwise, whatever was left behind."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_training import run_workers, start_worker, tiny_keys, tiny_model, tiny_rows

from ke_ray.errors import TrainingError
from ke_ray.training.checkpoint import full_tensors
from ke_ray.training.loop import train
from ke_ray.training.parallel import Worker

KEYS = {"save_every": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run_workers(tmp_path_factory.mktemp("undisturbed"), 1, keys=KEYS, dropout=0.2)


def kill_after(step: int, folder: Path) -> None:
    worker = start_worker(
        keys=KEYS,
        dropout=0.2,
        die_after=step,
        state_uri=str(folder / "states"),
        out=str(folder / "never.npz"),
    )
    worker.join(timeout=120)
    assert worker.exitcode == -signal.SIGKILL
    assert not (folder / "never.npz").exists()


def resume(folder: Path) -> dict[str, np.ndarray]:
    return run_workers(folder, 1, keys=KEYS, dropout=0.2, state_uri=str(folder / "states"))


def test_resume_after_kill_is_bitwise(tmp_path: Path, undisturbed: dict[str, np.ndarray]) -> None:
    kill_after(8, tmp_path)
    assert max(path.parent.name for path in tmp_path.glob("states/*/state.json")) == "step00000006"
    resumed = resume(tmp_path)
    for name, expected in undisturbed.items():
        if name.startswith("weight") or name == "loss":
            np.testing.assert_array_equal(resumed[name], expected, err_msg=name)
    assert len(resumed["loss"]) == 12  # rows recorded before the kill are there once


def test_half_written_states_are_passed_over(
    tmp_path: Path, undisturbed: dict[str, np.ndarray]
) -> None:
    kill_after(11, tmp_path)
    states = tmp_path / "states"
    assert sorted(p.name for p in states.iterdir()) == ["step00000006", "step00000009"]
    newest = states / "step00000009" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-40])
    (states / "step00000010").mkdir()  # a kill before state.json was written
    resumed = resume(tmp_path)
    np.testing.assert_array_equal(resumed["loss"], undisturbed["loss"])


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "states")
    keys = tiny_keys(save_every=2)
    train(tiny_model(), tiny_rows(), keys, num_steps=4, state_uri=uri, identity="a")
    with pytest.raises(TrainingError, match="another study"):
        train(tiny_model(), tiny_rows(), keys, num_steps=4, state_uri=uri, identity="b")


def test_states_go_to_any_store_and_old_ones_are_removed() -> None:
    uri = "memory://states-of-a-test"
    keys = tiny_keys(save_every=1)
    whole = train(tiny_model(), tiny_rows(), keys, num_steps=6)
    train(tiny_model(), tiny_rows(), keys, num_steps=6, state_uri=uri, identity="m")
    import fsspec

    names = sorted(p.rsplit("/", 1)[-1] for p in fsspec.filesystem("memory").ls(uri, detail=False))
    assert names == ["step00000005", "step00000006"]
    model = tiny_model(seed=9)  # its weights are replaced by the state's
    for name in names[1:]:  # as if the run had been killed before its end
        fsspec.filesystem("memory").rm(f"{uri}/{name}", recursive=True)
    again = train(model, tiny_rows(), keys, num_steps=6, state_uri=uri, identity="m")
    assert [r["loss"] for r in again.records["train"]] == [
        r["loss"] for r in whole.records["train"]
    ]


@pytest.mark.slow
def test_sharded_workers_resume_where_they_were(tmp_path: Path) -> None:
    keys = {"num_workers": 2, "strategy": "fsdp", "save_every": 4}
    uri = str(tmp_path / "states")
    whole = run_workers(tmp_path, 2, keys=keys, state_uri=uri)
    meta = json.loads((tmp_path / "states/step00000008/state.json").read_text())
    assert meta["world_size"] == 2
    shutil.rmtree(tmp_path / "states" / "step00000012")
    resumed = run_workers(tmp_path, 2, keys=keys, state_uri=uri)
    np.testing.assert_allclose(resumed["loss"], whole["loss"], atol=1e-6)
    shutil.rmtree(tmp_path / "states" / "step00000012")
    # A state of two sharded workers also serves one worker that has everything.
    alone = run_workers(tmp_path, 1, keys={"save_every": 4}, state_uri=uri)
    np.testing.assert_allclose(alone["loss"], whole["loss"], atol=1e-6)
    for name in (n for n in whole if n.startswith("weight")):
        np.testing.assert_allclose(alone[name], whole[name], atol=2e-6, err_msg=name)


def test_only_the_main_worker_holds_the_whole_model() -> None:
    model = tiny_model()
    whole = full_tensors(model, Worker(rank=0, world_size=2))
    assert set(whole) == {name for name, _ in model.named_parameters()}
    assert full_tensors(model, Worker(rank=1, world_size=2)) == {}
