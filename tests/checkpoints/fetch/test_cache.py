"""Fetching from a real HTTP server that is slow, truncates and fails."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_site import QUICK, WEIGHTS, Site, refs_of, truth

from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.transfer import public_url
from ke_ray.errors import CheckpointError, CheckpointSpecError, StorageError
from ke_ray.models.configuration import read_config


def test_fetched_whole_once_and_shared(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    with Store(tmp_path / "cache", policy=QUICK) as store, Store(tmp_path / "cache") as other:
        estimate = store.bytes_to_fetch(refs)
        assert estimate.num_to_fetch == 3
        assert estimate.num_unknown == 0
        sizes = [
            (site.root / f"step{step}-unsharded" / "model.safetensors").stat().st_size
            for step in range(3)
        ]
        assert (estimate.num_bytes, estimate.largest_bytes) == (sum(sizes), max(sizes))
        for step, ref in enumerate(refs):
            assert weights_sha256(store.fetch(ref)) == truth(site, step)
            assert other.fetch(ref) == store.fetch(ref)
        assert store.bytes_to_fetch(refs).num_to_fetch == 0
    assert site.count("GET", ".safetensors") == 3
    assert list((tmp_path / "cache" / "partial").iterdir()) == []


@pytest.mark.parametrize(
    "faults",
    [
        ["500", "503"],
        ["cut", "cut", "cut"],
        ["429:0"],
        ["stall"],
        ["cut", "norange"],
        ["cut", "502", "cut", "500"],
    ],
)
def test_faults_that_pass_change_nothing(site: Site, tmp_path: Path, faults: list[str]) -> None:
    site.faults[WEIGHTS] = list(faults)
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert weights_sha256(store.fetch(refs_of(site, tmp_path)[0])) == truth(site, 0)
    assert site.count("GET", WEIGHTS) == len(faults) + (0 if "norange" in faults else 1)
    if faults.count("cut") > 1:
        ranges = [r for m, path, r in site.requests if path == WEIGHTS and m == "GET"]
        assert ranges[-1] is not None  # resumed, not begun anew


def test_it_waits_as_long_as_the_server_asks(site: Site, tmp_path: Path) -> None:
    site.faults[WEIGHTS] = ["429:1"]
    start = time.monotonic()
    with Store(tmp_path / "cache", policy=QUICK) as store:
        store.fetch(refs_of(site, tmp_path)[0])
    assert time.monotonic() - start >= 1.0


def test_a_source_that_never_delivers_is_one_error(site: Site, tmp_path: Path) -> None:
    site.faults[WEIGHTS] = ["500"] * 50
    ref = refs_of(site, tmp_path)[0]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match="HTTP 500"):
            store.fetch(ref)
        assert site.count("GET", WEIGHTS) == QUICK.attempts
        assert not store.is_cached(ref)
        site.faults.clear()
        assert weights_sha256(store.fetch(ref)) == truth(site, 0)


def test_truncation_for_ever_is_an_error_and_a_later_run_resumes(
    site: Site, tmp_path: Path
) -> None:
    ref = refs_of(site, tmp_path)[0]
    whole = site.root / "step0-unsharded" / "model.safetensors"
    site.faults[WEIGHTS] = ["cut"] * 2 + ["500"] * 50
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match="arrived"):
            store.fetch(ref)
        partial = next((tmp_path / "cache" / "partial").rglob("*.incomplete"))
        assert partial.stat().st_size > whole.stat().st_size // 2
        site.faults.clear()
        site.requests.clear()
        assert weights_sha256(store.fetch(ref)) == truth(site, 0)
    assert next(r for m, p, r in site.requests if p == WEIGHTS and m == "GET") is not None


def test_a_file_that_changed_meanwhile_is_not_mixed(site: Site, tmp_path: Path) -> None:
    ref = refs_of(site, tmp_path)[0]
    site.faults[WEIGHTS] = ["cut", "400"]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match="HTTP 400"):
            store.fetch(ref)
        other = site.root / "step1-unsharded" / "model.safetensors"
        shutil.copyfile(other, site.root / "step0-unsharded" / "model.safetensors")
        assert weights_sha256(store.fetch(ref)) == truth(site, 1)


def test_missing_files_are_named(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    (site.root / "step0-unsharded" / "model.safetensors").unlink()
    (site.root / "step1-unsharded" / "config.yaml").unlink()
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError, match=r"none of model\.safetensors, model\.pt"):
            store.fetch(refs[0])
        with pytest.raises(CheckpointError, match="neither config"):
            store.fetch(refs[1])
        gone = replace(refs[2], location="http://127.0.0.1:9/step2-unsharded/")
        with pytest.raises(CheckpointError, match="Cannot fetch"):
            store.fetch(gone)


def test_a_base_url_is_a_spec(site: Site) -> None:
    (ref,) = list_checkpoints(f"{site.url}/step2-unsharded")
    assert (ref.step, ref.format, ref.name) == (2, "native", "step2-unsharded")
    with pytest.raises(CheckpointSpecError, match="neither config"):
        list_checkpoints(f"{site.url}/nothing/")
    with pytest.raises(CheckpointSpecError, match="Cannot reach"):
        list_checkpoints("http://127.0.0.1:9/step1/")


def test_a_configuration_is_read_without_the_weights(site: Site, tmp_path: Path) -> None:
    config = read_config(refs_of(site, tmp_path)[1])
    assert (config.model_type, config.intermediate_size) == ("olmo", 512)
    assert site.count("GET", ".safetensors") == 0


def test_local_checkpoints_pass_through(site: Site, tmp_path: Path) -> None:
    refs = list_checkpoints(str(site.root))
    with Store(tmp_path / "cache", cache_bytes=1) as store:
        assert store.fetch(refs[0]) == str(site.root / "step0-unsharded")
        assert store.bytes_to_fetch(refs).num_bytes == 0
        store.release(refs[0])
    assert not (tmp_path / "cache").exists()


def test_it_can_be_stopped(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    with (
        Store(tmp_path / "cache", policy=QUICK) as store,
        pytest.raises(CheckpointError, match="caller stopped it"),
    ):
        store.fetch(refs[0], should_stop=lambda: site.count("GET", WEIGHTS) > 0)


def test_cache_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        Store(tmp_path / "file" / "cache", policy=QUICK) as store,
        pytest.raises(StorageError, match="--cache-dir"),
    ):
        store.fetch(refs_of(site, tmp_path)[0])


def test_names_cannot_leave_the_cache(site: Site, tmp_path: Path) -> None:
    ref = replace(refs_of(site, tmp_path)[0], name="../../../escaped")
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert Path(store.fetch(ref)).parent == tmp_path / "cache" / "entries"


def test_secrets_in_urls_stay_out_of_messages(site: Site, tmp_path: Path) -> None:
    url = site.url.replace("http://", "http://user:hunter2@") + "/step0-unsharded"
    assert public_url(f"{url}/x?token=hunter2") == f"{site.url}/step0-unsharded/x"
    site.faults[WEIGHTS] = ["400"]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError) as caught:
            store.fetch(CheckpointRef("x", url, "native"))
        assert "hunter2" not in str(caught.value)
