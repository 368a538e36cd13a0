"""Checkpoints of a node: shared between threads and processes, evicted within a budget."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from checkpoint_site import QUICK, WEIGHTS, Site, refs_of, truth
from filelock import FileLock
from waiting import wait_for

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.pieces import arrived_bytes
from ke_ray.errors import StorageError


def size_of_one(site: Site) -> int:
    folder = site.root / "step0-unsharded"
    return sum(path.stat().st_size for path in folder.iterdir())


def test_least_recently_used_goes_first_and_the_budget_holds(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(2.5 * size_of_one(site))
    with Store(tmp_path / "cache", budget, policy=QUICK) as store:
        for ref in (refs[0], refs[1], refs[0]):
            store.fetch(ref)
            store.release(ref)
            time.sleep(0.02)
        store.fetch(refs[2])
        assert [store.is_cached(ref) for ref in refs] == [True, False, True]
        assert store.used_bytes() <= budget


def test_what_is_in_use_is_never_taken(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(1.5 * size_of_one(site))
    with Store(tmp_path / "cache", budget, policy=QUICK, wait_s=0.5) as store:
        folder = store.fetch(refs[0])
        with pytest.raises(StorageError, match="full of checkpoints in use"):
            store.fetch(refs[1])
        assert weights_sha256(folder) == truth(site, 0)


def test_a_fetch_waits_until_there_is_room(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(1.5 * size_of_one(site))
    with Store(tmp_path / "cache", budget, policy=QUICK) as store:
        store.fetch(refs[0])
        fetched: list[str] = []
        ahead = threading.Thread(target=lambda: fetched.append(store.fetch(refs[1])))
        ahead.start()
        time.sleep(0.5)
        assert fetched == []
        store.release(refs[0])
        ahead.join(20)
        assert weights_sha256(fetched[0]) == truth(site, 1)
        assert store.used_bytes() <= budget


def test_two_leases_need_two_releases(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(1.5 * size_of_one(site))
    with Store(tmp_path / "cache", budget, policy=QUICK, wait_s=0.3) as store:
        store.fetch(refs[0])
        store.fetch(refs[0])
        store.release(refs[0])
        with pytest.raises(StorageError):
            store.fetch(refs[1])
        store.release(refs[0])
        store.release(refs[0])
        store.fetch(refs[1])


def test_a_checkpoint_larger_than_the_budget_is_said_at_once(site: Site, tmp_path: Path) -> None:
    with (
        Store(tmp_path / "cache", 1000, policy=QUICK) as store,
        pytest.raises(StorageError, match="whole cache budget of 1,000"),
    ):
        store.fetch(refs_of(site, tmp_path)[0])
    assert site.count("GET", ".safetensors") == 0
    with pytest.raises(StorageError, match="cache_bytes is 0"):
        Store(tmp_path / "cache", 0)


CHILD = """
import sys, time
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.fetch.cache import Store
store = Store(sys.argv[1])
folder = store.fetch(list_checkpoints(sys.argv[2])[int(sys.argv[3])])
print(folder, flush=True)
time.sleep(float(sys.argv[4]))
"""


def child(tmp_path: Path, step: int, stay_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, tmp_path / "cache", tmp_path / "list.csv", step, stay_s]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_processes_share_one_fetch(site: Site, tmp_path: Path) -> None:
    refs_of(site, tmp_path)
    site.pause_s = 0.05
    children = [child(tmp_path, 0, 0.0) for _ in range(3)]
    folders = {process.communicate(timeout=120)[0].strip() for process in children}
    assert len(folders) == 1
    assert weights_sha256(folders.pop()) == truth(site, 0)
    assert site.count("GET", WEIGHTS) == 1


def test_a_killed_user_holds_nothing(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(1.5 * size_of_one(site))
    user = child(tmp_path, 0, 600.0)
    assert user.stdout is not None
    user.stdout.readline()
    with Store(tmp_path / "cache", budget, policy=QUICK, wait_s=0.3) as store:
        with pytest.raises(StorageError, match="in use"):
            store.fetch(refs[1])
        user.kill()
        user.wait()
        assert weights_sha256(store.fetch(refs[1])) == truth(site, 1)
        assert not store.is_cached(refs[0])
    user.stdout.close()


def test_a_killed_fetch_is_resumed(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    site.pause_s = 0.3
    fetcher = child(tmp_path, 0, 600.0)
    partial = tmp_path / "cache" / "partial"
    wait_for(
        lambda: any(arrived_bytes(p) > 0 for p in partial.rglob("model.safetensors.incomplete"))
    )
    fetcher.kill()
    fetcher.communicate()
    site.pause_s = 0.0
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert weights_sha256(store.fetch(refs[0])) == truth(site, 0)
    begun = [asked for method, path, asked in site.requests if (method, path) == ("GET", WEIGHTS)]
    assert str(begun[0]).startswith("bytes=0-")
    assert not str(begun[1]).startswith(("None", "bytes=0-"))


def test_many_threads_within_a_small_budget(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    budget = int(2.2 * size_of_one(site))
    problems: list[str] = []
    largest: list[int] = []

    def work(seed: int) -> None:
        with Store(tmp_path / "cache", budget, policy=QUICK, wait_s=120) as store:
            for turn in range(6):
                step = (seed + turn) % 3
                try:
                    folder = store.fetch(refs[step])
                    largest.append(store.used_bytes())
                    if weights_sha256(folder) != truth(site, step):
                        problems.append(f"{step} differs")
                    store.release(refs[step])
                except Exception as error:
                    problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert problems == []
    assert max(largest) <= budget
    assert Counter(ref.step for ref in refs) == {0: 1, 1: 1, 2: 1}


def test_no_fetch_ends_while_bytes_are_counted(site: Site, tmp_path: Path) -> None:
    ref = refs_of(site, tmp_path)[0]
    cache = tmp_path / "cache"
    site.pause_s = 0.5
    with Store(cache, policy=QUICK) as store:
        fetcher = threading.Thread(target=store.fetch, args=(ref,))
        fetcher.start()
        wait_for(lambda: any(cache.glob("partial/*/model.safetensors.incomplete")))
        with FileLock(cache / "budget.lock"):
            site.pause_s = 0.0
            wait_for(lambda: any(cache.glob("partial/*/model.safetensors")))
            time.sleep(0.3)
            assert not store.is_cached(ref)
        fetcher.join(60)
        assert store.is_cached(ref)
