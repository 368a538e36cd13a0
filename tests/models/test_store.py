"""Fetching from a real HTTP server that is slow, truncates and fails; sharing and evicting."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ke_ray.errors import CheckpointError, CheckpointSpecError, StorageError
from ke_ray.models.catalog import list_checkpoints
from ke_ray.models.fingerprint import weights_sha256
from ke_ray.models.reference import CheckpointRef
from ke_ray.models.remote_config import read_config
from ke_ray.models.saving import save_model
from ke_ray.models.store import Store
from ke_ray.models.transfer import RetryPolicy, redact

QUICK = RetryPolicy(attempts=4, backoff_s=0.02, max_retry_after_s=1.0, timeout_s=2.0)


class Site(http.server.ThreadingHTTPServer):
    """Serves a folder; ``faults[path]`` is a list of what goes wrong, one for each request."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.pause_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, ending: str) -> int:
        return sum(m == method and path.endswith(ending) for m, path, _ in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        file = self.server.root / self.path.strip("/")
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults and body else ""
        status, _, detail = fault.partition(":")
        if status.isdigit():
            self.send_response(int(status))
            if detail:
                self.send_header("Retry-After", detail)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        start = 0
        etag = f'"{hash(data)}"'
        if wanted and self.headers.get("If-Range") == etag and fault != "norange":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", etag)
        self.end_headers()
        if not body:
            return
        rest = data[start:]
        if fault == "cut":
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            time.sleep(3)
            self.close_connection = True
        else:
            for offset in range(0, len(rest), 65536):
                self.wfile.write(rest[offset : offset + 65536])
                if self.server.pause_s:
                    time.sleep(self.server.pause_s)


@pytest.fixture
def site(tmp_path: Path, tiny_decoder, monkeypatch) -> Iterator[Site]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "site"
    for seed in range(3):
        model = tiny_decoder("olmo", seed=seed, hidden_size=64, intermediate_size=512)
        save_model(model, root / f"step{seed}-unsharded", layout="native")
    server = Site(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def refs_of(site: Site, tmp_path: Path) -> list[CheckpointRef]:
    rows = [f"{step},{site.url}/step{step}-unsharded/" for step in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["Step,Checkpoint Directory", *rows]))
    return list_checkpoints(str(tmp_path / "list.csv"))


WEIGHTS = "/step0-unsharded/model.safetensors"


def truth(site: Site, step: int) -> str:
    return weights_sha256(site.root / f"step{step}-unsharded")


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
    with pytest.raises(StorageError, match="cache_bytes=0"):
        Store(tmp_path / "cache", 0)


CHILD = """
import sys, time
from ke_ray.models.catalog import list_checkpoints
from ke_ray.models.store import Store
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
    deadline = time.monotonic() + 60
    partial = tmp_path / "cache" / "partial"
    while not any(p.stat().st_size > 0 for p in partial.rglob("model.safetensors.incomplete")):
        assert time.monotonic() < deadline
        assert fetcher.poll() is None
        time.sleep(0.01)
    fetcher.kill()
    fetcher.communicate()
    site.pause_s = 0.0
    with Store(tmp_path / "cache", policy=QUICK) as store:
        assert weights_sha256(store.fetch(refs[0])) == truth(site, 0)
    begun = [asked for method, path, asked in site.requests if (method, path) == ("GET", WEIGHTS)]
    assert begun[0] is None
    assert begun[1] is not None


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


def test_it_can_be_stopped(site: Site, tmp_path: Path) -> None:
    refs = refs_of(site, tmp_path)
    with (
        Store(tmp_path / "cache", policy=QUICK) as store,
        pytest.raises(CheckpointError, match="asked to stop"),
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
    assert redact(f"{url}/x?token=hunter2") == f"{site.url}/step0-unsharded/x"
    site.faults[WEIGHTS] = ["400"]
    with Store(tmp_path / "cache", policy=QUICK) as store:
        with pytest.raises(CheckpointError) as caught:
            store.fetch(CheckpointRef("x", url, "native"))
        assert "hunter2" not in str(caught.value)
