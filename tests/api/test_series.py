"""A loop over a series: in order, fetched ahead, freed behind, one failure at its own place."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path

import pytest
from checkpoint_site import Site, refs_of

import ke_ray
from ke_ray.errors import CheckpointError, CheckpointSpecError, UserError


def listed(site: Site, folder: Path) -> str:
    refs_of(site, folder)
    return str(folder / "list.csv")


def test_models_come_in_order_and_go(series: Path) -> None:
    checkpoints = ke_ray.series(str(series), steps="10:30", every=2)
    assert len(checkpoints) == 2
    behind = []
    for checkpoint in checkpoints:
        assert checkpoint.model is checkpoint.model
        assert not checkpoint.model.training
        behind.append((checkpoint, weakref.ref(checkpoint.model)))
    gc.collect()
    assert [checkpoint.step for checkpoint, _ in behind] == [10, 30]
    assert [checkpoint.name for checkpoint, _ in behind] == ["step10", "step30"]
    assert [model() for _, model in behind] == [None, None]
    with pytest.raises(UserError, match="'step10' is no longer.*before the next iteration"):
        _ = behind[0][0].model
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 30], "a second loop"


def test_the_next_one_is_fetched_meanwhile_and_the_budget_holds(site: Site, tmp_path: Path) -> None:
    spec, cache = listed(site, tmp_path), tmp_path / "cache"
    size = max(path.stat().st_size for path in site.root.rglob("model.safetensors"))
    budget = 2 * size + 100_000
    fetched = []
    for checkpoint in ke_ray.series(spec, cache_dir=str(cache), cache_bytes=budget):
        assert checkpoint.folder.is_dir()
        deadline = time.monotonic() + 60
        while site.count("GET", ".safetensors") < min(len(fetched) + 2, 3):
            assert time.monotonic() < deadline, "the next one does not come by itself"
            time.sleep(0.01)
        fetched.append(site.count("GET", ".safetensors"))
        kept = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
        assert kept <= budget
    assert fetched == [2, 3, 3]


def test_checkpoints_that_are_passed_over_keep_no_room(site: Site, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in site.root.rglob("model.safetensors"))
    options = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": int(1.5 * size), "prefetch": 0}
    for checkpoint in ke_ray.series(listed(site, tmp_path), **options):
        if checkpoint.step == 2:  # the fetches of the others are under way or just done
            assert checkpoint.model.num_parameters() > 0


def test_a_checkpoint_that_fails_fails_alone(site: Site, tmp_path: Path) -> None:
    spec = listed(site, tmp_path)
    (site.root / "step1-unsharded" / "model.safetensors").write_bytes(b"no weights")
    steps, failed = [], []
    for checkpoint in ke_ray.series(spec, cache_dir=str(tmp_path / "cache")):
        try:
            assert checkpoint.model.num_parameters() > 0
            steps.append(checkpoint.step)
        except CheckpointError:
            failed.append(checkpoint.step)
    assert (steps, failed) == ([0, 2], [1])


def test_a_loop_that_is_left_early_fetches_no_more(site: Site, tmp_path: Path) -> None:
    site.pause_s = 0.05
    for checkpoint in ke_ray.series(listed(site, tmp_path), cache_dir=str(tmp_path / "cache")):
        assert checkpoint.folder.is_dir()
        break
    gc.collect()
    asked = len(site.requests)
    time.sleep(0.3)
    assert len(site.requests) == asked
    assert list((tmp_path / "cache" / "leases").glob("*.lock")) == []


def test_wrong_requests_say_so(series: Path) -> None:
    with pytest.raises(UserError, match="prefetch is -1; give"):
        ke_ray.series(str(series), prefetch=-1)
    with pytest.raises(CheckpointSpecError, match="steps 10 to 40"):
        ke_ray.series(str(series), steps="5:6")
