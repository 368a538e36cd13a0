"""How a scan loads: bytes read, memory used, and what waits for what. Parts of ``scanning.py``.

Each figure of one load is taken in a fresh process, which says what the kernel counted for it
(``/proc/self/io``, ``/proc/self/status``; Linux only).
"""

from __future__ import annotations

import http.server
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scan_world import ITEM_S, THREADS, Times, calibrate, run_engine, save_checkpoint, save_corpus

MIB = 2**20
NUM_SLOW = 7  # checkpoints from a slow server
SLOW_SHARE = 0.6  # of the time an item is scored, for one to arrive


def measure_loading() -> tuple[dict[str, float], dict[str, Any]]:
    """One load of a checkpoint, and a scan whose checkpoints come slowly."""
    ratios, details = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for stored in ("float32", "bfloat16"):
            folder = save_checkpoint(Path(root, stored), 0, stored)
            for dtype in ("float32", "bfloat16"):
                found = measure_load(folder, dtype)
                name = f"{stored}_to_{dtype}"
                ratios[f"bytes_read.{name}"] = found["read"]
                ratios[f"own_memory.{name}"] = found["own_memory"]
                details[name] = {key: round(value, 3) for key, value in found.items()}
        names = [f"step{number}" for number in range(NUM_SLOW)]
        for number, name in enumerate(names):
            save_checkpoint(Path(root, "series", name), number)
        corpus = str(save_corpus(Path(root, "ids.npy"), 256))
        num_instances = calibrate(Path(root, "series", names[0]), corpus, THREADS)
        num_bytes = Path(root, "series", names[0], "model.safetensors").stat().st_size
        times = Times()
        with slow_server(Path(root, "series"), num_bytes / (SLOW_SHARE * ITEM_S)) as server:
            listing = write_listing(Path(root, "list.csv"), server.url, names)
            outcome = run_engine(
                str(listing), corpus, num_instances, 1, times, cache_dir=f"{root}/cache"
            )
            ratios["bytes_sent"] = server.sent["model.safetensors"] / (NUM_SLOW * num_bytes)
    scored = sum(item["score_s"] for item in outcome.timings[1:])
    loaded = [item["fetch_s"] + item["load_s"] for item in outcome.timings[1:]]
    ratios["idle_share"] = 1 - scored / (times.done[-1] - times.done[0])
    ratios["idle_share_without_overlap"] = sum(loaded) / (sum(loaded) + scored)
    details["slow_source"] = {
        "score_s": round(scored / len(loaded), 2),
        "fetch_and_load_s": round(statistics.median(loaded), 2),
    }
    return ratios, details


def measure_load(folder: Path, dtype: str) -> dict[str, float]:
    """What one load of a checkpoint costs.

    Returns:
        ``read``: bytes that came from the disk, over those of the weight file, when it is loaded
        and hashed as a scorer does. ``own_memory``: growth of memory that is no mapped file, at
        its peak, over the bytes of the model; ``kept``: the same when all is loaded. ``load_s``.
    """
    return _apart("read", folder, dtype) | _apart("memory", folder, dtype)


def _apart(what: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), what, str(folder), dtype]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def load_once(what: str, folder: Path, dtype: str) -> dict[str, float]:
    """One half of ``measure_load``, in this process."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from ke_ray.checkpoints.formats.fingerprint import weights_sha256
    from ke_ray.models.loading import load_config, load_model

    _build(load_config(folder))  # imports only
    file = folder / "model.safetensors"
    _drop_from_page_cache(file)
    before, read_before, started = _own_memory(), _bytes_read(), time.monotonic()
    peak = _Peak(before)
    with ThreadPoolExecutor(1) as hasher:
        if what == "read":
            hasher.submit(weights_sha256, folder)
        with peak:
            model = load_model(folder, dtype=getattr(torch, dtype))
        load_s = time.monotonic() - started
    if what == "read":
        return {"read": (_bytes_read() - read_before) / file.stat().st_size, "load_s": load_s}
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "own_memory": peak.growth / model_bytes,
        "kept": (_own_memory() - before) / model_bytes,
        "megabytes": model_bytes / 1e6,
    }


def _build(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def _own_memory() -> int:
    """Resident bytes of this process that are no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class _Peak:
    """The largest anonymous memory, looked at every two milliseconds."""

    def __init__(self, before: int) -> None:
        self._before, self.growth = before, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            self.growth = max(self.growth, _own_memory() - self._before)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the server's folder, at most so many bytes a second, counted."""

    protocol_version = "HTTP/1.1"

    def copyfile(self, source: Any, outputfile: Any) -> None:
        server: Any = self.server
        started, sent = time.monotonic(), 0
        while piece := source.read(MIB):
            outputfile.write(piece)
            sent += len(piece)
            time.sleep(max(0.0, sent / server.bytes_per_s - (time.monotonic() - started)))
        with server.guard:
            server.sent[Path(self.path).name] = server.sent.get(Path(self.path).name, 0) + sent

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def slow_server(folder: Path, bytes_per_s: float) -> Iterator[Any]:
    """Serves ``folder``; ``.sent`` has the bytes of bodies by file name, ``.url`` its address."""

    def handler(*arguments: Any) -> _Handler:
        return _Handler(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        server: Any = plain
        server.bytes_per_s, server.guard, server.sent = bytes_per_s, threading.Lock(), {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def write_listing(path: Path, url: str, names: list[str]) -> Path:
    """A list of checkpoints at URLs, in the published form."""
    rows = [f"{number},{url}/{name}" for number, name in enumerate(names)]
    path.write_text("\n".join(["Step,Checkpoint Directory", *rows]) + "\n")
    return path


if __name__ == "__main__":
    print(json.dumps(load_once(sys.argv[1], Path(sys.argv[2]), sys.argv[3])))
