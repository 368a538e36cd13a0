"""The shipped scans at real size on this machine: what is moved, held and waited for.

    nice python benchmarks/rehearsal.py [--only OLMo-1B] [--out runs/rehearsal] [--tiny]

A stand-in of the Hub (``rehearsal_hub.py``) has three revisions of OLMo-1B and one of OLMo-7B with
the published configs, names, layouts and sizes, of random weights. ``ke-ray scan`` runs on
``sweeps/olmo_1b.yaml`` and ``sweeps/olmo_7b.yaml`` as they are shipped, with few and short
instances, and is set beside what ``--dry-run`` predicts of the same command. Recorded: bytes moved,
the disk's peak, peaks of the driver and of the scorer in memory of their own (anonymous pages, what
cannot be given back) and in all, and seconds by phase.

Needs 14 GiB of memory for OLMo-7B in bfloat16 and, at a time, 28 GB of disk in ``--out``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rehearsal_hub import GeneratingHub, checkpoint_files, generating_hub
from shape import OLMO_1B, OLMO_7B, Shape
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from https_hosts import https_hosts, serving_files

ROOT = Path(__file__).resolve().parents[1]
DATA = "dolma-v1_6-8B-sample/v1_5r2_sample-0000.json.gz"
WORDS = [f"word{n}" for n in range(900)]
INSTANCES, LENGTH = 4, 128
TINY = Shape(2, 64, 128, 4, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """A shipped study and its series at the stand-in.

    Attributes:
        tied: whether embeddings are the LM head too.
        every: the study's, so that each of that many revisions in a row has the same weights, and
            only the first of them is scanned.
    """

    study: str
    repo: str
    shape: Shape
    tied: bool
    every: int
    revisions: tuple[str, ...]


CASES = {
    "OLMo-1B": Case(
        "olmo_1b",
        "allenai/OLMo-1B-hf",
        OLMO_1B,
        tied=True,
        every=10,
        revisions=tuple(f"step{n}000-tokens{n * 2048 * 2048 // 10**6}B" for n in range(20, 41)),
    ),
    "OLMo-7B": Case(
        "olmo_7b",
        "allenai/OLMo-7B-hf",
        OLMO_7B,
        tied=False,
        every=20,
        revisions=("step557000-tokens2464B",),
    ),
}


@dataclass
class Peaks:
    """The largest of each quantity, in bytes, by what has it."""

    values: dict[str, int] = field(default_factory=dict)

    def see(self, name: str, value: int) -> None:
        self.values[name] = max(self.values.get(name, 0), value)


def prepare(hub: GeneratingHub, case: Case, shape: Shape) -> int:
    """Add the revisions; the bytes of the weights that a scan needs."""
    config = shape.config(eos_token_id=50279 % shape.vocabulary, tie_word_embeddings=case.tied)
    config.architectures = ["OlmoForCausalLM"]
    needed = [
        checkpoint_files(config, seed) for seed in range(-(-len(case.revisions) // case.every))
    ]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for index, revision in enumerate(case.revisions):
        hub.add(case.repo, revision, config, needed[index // case.every])
    hub.add(case.repo, "main", config, {})  # asked for the tokenizer alone
    tokenizer.save(str(hub.root / case.repo / "main" / "tokenizer.json"))
    return sum(file.size_bytes for files in needed for file in files.values())


def save_documents(root: Path) -> None:
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, 500)) for _ in range(100))
    lines = [json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts)]
    (root / DATA).parent.mkdir(parents=True, exist_ok=True)
    (root / DATA).write_bytes(gzip.compress("".join(lines).encode()))


def processes_below(pid: int) -> Iterator[int]:
    """``pid`` and all that it started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from processes_below(int(child))


def kind_of(pid: int, driver: int) -> str | None:
    """Driver or scorer; None: any other process."""
    if pid == driver:
        return "driver"
    title = Path(f"/proc/{pid}/cmdline").read_bytes()
    return "scorer" if b"CheckpointScorer" in title else None


def memory_of(pid: int) -> dict[str, int]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {k: int(v) * 1024 for k, v in re.findall(r"^(Rss|Anonymous): +(\d+) kB", text, re.M)}
    return {"resident": found["Rss"], "own": found["Anonymous"]}


@contextmanager
def watched(process: subprocess.Popen[str], cache: Path, peaks: Peaks) -> Iterator[None]:
    """Sample memory and disk twice a second until the block ends."""
    over = threading.Event()

    def sample() -> None:
        for pid in processes_below(process.pid):
            try:
                if kind := kind_of(pid, process.pid):
                    for what, value in memory_of(pid).items():
                        peaks.see(f"{kind}_{what}_bytes", value)
            except (OSError, KeyError):  # it has ended
                continue
        files = (f for f in cache.rglob("*") if f.is_file() and not f.is_symlink())
        peaks.see("disk_bytes", sum(f.stat().st_blocks * 512 for f in files))

    def sample_on() -> None:
        while not over.wait(0.5):
            try:
                sample()
            except OSError:  # a file was renamed while it was counted
                continue

    thread = threading.Thread(target=sample_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rehearse(name: str, shape: Shape, out: Path) -> dict[str, Any]:
    case = CASES[name]
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    save_documents(folder / "files")
    with generating_hub(folder / "hub") as hub, serving_files(folder / "files") as (url, _):
        size = prepare(hub, case, shape)
        hub.base = "https://huggingface.co"
        with https_hosts({"huggingface.co": hub.url, "olmo-data.org": url}, folder) as variables:
            return scan(case, folder, hub, variables) | {"published_bytes": size}


def scan(case: Case, folder: Path, hub: GeneratingHub, variables: dict[str, str]) -> dict[str, Any]:
    """Predict, run and measure one command."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | variables
    for name in ("RAY_ADDRESS", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    environment |= {
        "HF_HOME": str(folder / "hf"),
        "KE_RAY_RUNS": str(folder / "runs"),
        "KE_RAY_CACHE": str(folder / "cache"),
        "RAY_TMPDIR": environment.get("RAY_TMPDIR", "/tmp"),
    }
    command = [sys.executable, "-m", "ke_ray", "-v", "scan", f"sweeps/{case.study}.yaml"]
    command += ["--num-instances", str(INSTANCES), "--sequence-length", str(LENGTH)]
    command += ["--num-actors", "1", "--no-mlflow", "--output", str(folder / "scan")]
    plan = subprocess.run(
        [*command, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if plan.returncode:
        raise SystemExit(plan.stdout + plan.stderr)
    peaks, started = Peaks(), time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        with watched(process, folder / "cache", peaks):
            process.wait()
    took_s = time.monotonic() - started
    text = (folder / "log.txt").read_text()
    if process.returncode:
        raise SystemExit(text)
    return {
        "predicted": predictions(plan.stdout),
        "took_s": took_s,
        "sent_bytes": hub.sent_bytes,
        **peaks.values,
        **phases(text),
    }


def predictions(text: str) -> dict[str, str]:
    """The lines of the plan that predict."""
    lines = (line.partition(": ") for line in text.splitlines())
    return {k: v for k, _, v in lines if k.startswith(("bytes to", "peak", "hours", "memory"))}


def phases(log: str) -> dict[str, float]:
    """Seconds of all items by what a scorer did."""
    total: dict[str, float] = {}
    for name, seconds in re.findall(r"\b((?:fetch|load|score|wait)_s) ([\d.]+)", log):
        total[name] = total.get(name, 0.0) + float(seconds)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for name, case in CASES.items():
        if arguments.only in (None, name):
            result = rehearse(name, TINY if arguments.tiny else case.shape, out)
            (out / f"{name}.json").write_text(json.dumps(result, indent=1))
            shutil.rmtree(out / name / "cache", ignore_errors=True)
            print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
