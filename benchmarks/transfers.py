"""Speed of parallel ranges, and what a killed fetch of six shards fetches twice.

    python benchmarks/transfers.py [--json] [--megabytes 800] [--checkpoint-gigabytes 27.5]

A local host gives each connection 20 MB/s. One file is fetched over one connection and as ke_ray
does, in one run. Then a checkpoint of six shards is fetched from a stand-in of the Hub by a
process that is killed half-way, and again to its end: the host counts the bytes that it sent, the
client verifies each shard's sha256. The content is made while it is sent; the client's disk holds
the checkpoint once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from file_host import serving

from ke_ray.checkpoints.transfer import fetch_file

BYTES_PER_S = 20e6
SHARDS = 6
_FETCH = """
import sys
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.reference import CheckpointRef
ref = CheckpointRef("lm", "hf://org/lm", "hub", revision="main", commit="c0ffee")
with Store(sys.argv[1]) as store:
    print(store.fetch(ref))
"""


def speeds(num_bytes: int, folder: Path) -> dict[str, float]:
    """Bytes per second over one connection, and with ``fetch_file``."""
    with serving({"weights": num_bytes}, BYTES_PER_S) as host:
        started = time.monotonic()
        with urllib.request.urlopen(f"{host.url}/weights") as response:
            left = num_bytes // 4  # its speed does not change
            while left > 0:
                left -= len(response.read(min(left, 2**20)))
        one = num_bytes // 4 / (time.monotonic() - started)
        started = time.monotonic()
        fetch_file(f"{host.url}/weights", folder / "weights", hashed=True)
        many = num_bytes / (time.monotonic() - started)
    (folder / "weights").unlink()
    return {"one_connection": one, "ke_ray": many, "ratio": many / one}


def killed_once(num_bytes: int, folder: Path, kill_at: float = 0.5) -> dict[str, float]:
    """The share of a checkpoint that is sent twice when its first fetch is killed."""
    names = [f"model-{n:05}-of-{SHARDS:05}.safetensors" for n in range(1, SHARDS + 1)]
    shards = dict.fromkeys(names, num_bytes // SHARDS)
    with serving(shards) as host:
        index = {"metadata": {}, "weight_map": {name: name for name in names}}
        host.texts["config.json"] = b"{}"
        host.texts["model.safetensors.index.json"] = json.dumps(index).encode()
        entries = host.tree()  # the sha256 of all shards, once
        host.tree = lambda: entries  # type: ignore[method-assign]
        command = [sys.executable, "-c", _FETCH, str(folder)]
        variables = {**os.environ, "HF_ENDPOINT": host.url}
        with subprocess.Popen(command, env=variables) as first:
            while host.num_sent < kill_at * num_bytes:
                assert first.poll() is None
                time.sleep(0.005)
            first.kill()
        sent_at_kill = host.num_sent
        started = time.monotonic()
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        return {
            "gigabytes": num_bytes / 1e9,
            "sent_at_kill": sent_at_kill / num_bytes,
            "twice": host.num_sent / (num_bytes // SHARDS * SHARDS) - 1,
            "rest_megabytes_per_s": (host.num_sent - sent_at_kill) / seconds / 1e6,
        }


def main() -> None:
    """Run, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--checkpoint-gigabytes", type=float, default=27.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speed = speeds(options.megabytes * 10**6, Path(folder))
        print(
            f"one connection {speed['one_connection'] / 1e6:.1f} MB/s, ke_ray "
            f"{speed['ke_ray'] / 1e6:.1f} MB/s: {speed['ratio']:.2f} times"
        )
        killed = killed_once(int(options.checkpoint_gigabytes * 1e9), Path(folder) / "cache")
        print(
            f"{killed['gigabytes']:.1f} GB in {SHARDS} shards, killed at "
            f"{killed['sent_at_kill']:.0%}: {killed['twice']:.2%} sent twice; "
            f"the rest at {killed['rest_megabytes_per_s']:.0f} MB/s"
        )
    if options.json:
        print(json.dumps({"speed": speed, "killed": killed}))


if __name__ == "__main__":
    main()
