"""Time and memory of scoring and scanning as work grows: 1×, 4× and 16×.

    python benchmarks/growth.py [--json] [--rounds 5]

Instances, sequence length and layers grow one at a time from a base of 8 instances of 128 tokens
on an OLMo with 2 layers, d_model 256, d_mlp 1,024, 8 heads, vocabulary 4,096 (float32, random
weights, batch 4, all default measures). Each size runs in a process of its own: CPU seconds are
the median of ``--rounds`` runs after one that is not counted; memory is the peak above the loaded
weights during the first of them.

Checkpoints grow from 4 in real scans, two actors in one Ray session, checkpoints of 2 layers and
d_model 64: wall seconds from the first finished checkpoint to the end of the scan, the peak of the
driver above what it held before the scan, and the largest actor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from shape import Shape

INSTANCES, SEQUENCE, LAYERS, CHECKPOINTS = 8, 128, 2, 4
FACTORS = (1, 4, 16)
SIZES, VOCABULARY = (256, 1024, 8), 4096  # d_model, d_mlp, heads


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def score(instances: int, sequence: int, layers: int, rounds: int) -> dict[str, float]:
    """One size, in this process."""
    import torch

    from ke_ray.core.measures import DEFAULT_MEASURES
    from ke_ray.models.scoring import score_instances

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = Shape(layers, *SIZES, VOCABULARY, SEQUENCE * max(FACTORS)).model()
    ids = torch.randint(2, VOCABULARY, (instances, sequence))

    def run() -> None:
        score_instances(model, ids, measures=DEFAULT_MEASURES, num_instances=instances)

    before = resident("VmRSS")
    forget_peak()
    run()
    peak = resident("VmHWM") - before
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        seconds.append(time.process_time() - started)
    return {"seconds": statistics.median(seconds), "bytes": peak}


def sizes() -> dict[str, list[tuple[int, int, int]]]:
    """Instances, sequence length and layers of each size, by what grows."""
    return {
        "instances": [(INSTANCES * f, SEQUENCE, LAYERS) for f in FACTORS],
        "sequence length": [(INSTANCES, SEQUENCE * f, LAYERS) for f in FACTORS],
        "layers": [(INSTANCES, SEQUENCE, LAYERS * f) for f in FACTORS],
    }


class Watch:
    """Notes the first finished checkpoint, and the largest scorer while the scan runs."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.largest = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self, **_: Any) -> None:
        self._thread.start()

    def tokens(self, num_tokens: int, *_: Any) -> None:
        pass

    def ended(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        assert all(row["status"] == "ok" for row in rows), rows
        self.first = self.first or time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        import psutil

        while not self._stopped.wait(0.25):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "CheckpointScorer" in " ".join(process.cmdline()):
                        self.largest = max(self.largest, process.memory_info().rss)
                except psutil.Error:
                    continue


def scan(rounds: int, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Scans of 1×, 4× and 16× as many checkpoints, ``rounds`` times in turn."""
    from transformers.utils import logging

    from ke_ray.engine.cluster.session import ray_session
    from ke_ray.engine.scan.run import run_scan
    from ke_ray.planning.scan import prepare_scan
    from ke_ray.studies.scan import ScanStudy
    from ke_ray.tracking.tracker import open_tracker

    logging.disable_progress_bar()
    shape = Shape(2, 64, 256, 4, 512, 64)
    found: dict[int, list[dict[str, float]]] = {factor: [] for factor in FACTORS}
    with tempfile.TemporaryDirectory() as root, ray_session(num_cpus=2):
        for number in range(CHECKPOINTS * max(FACTORS)):
            shape.model(seed=number).save_pretrained(Path(root, "series", f"step{number:03d}"))
        corpus = Path(root, "ids.npy")
        np.save(corpus, np.random.default_rng(0).integers(2, 512, (64, 64)).astype(np.uint16))
        for factor in [FACTORS[0], *FACTORS * rounds]:  # the first is not counted
            study = ScanStudy.model_validate(
                {
                    "checkpoints": {
                        "spec": f"{root}/series",
                        "steps": f"0:{CHECKPOINTS * factor - 1}",
                    },
                    "data": {"corpus": str(corpus)},
                    "num_instances": 64,
                    "sequence_length": 64,
                    "output": tempfile.mkdtemp(dir=root),
                    "mlflow": {"enabled": False},
                }
            )
            watch, before = Watch(), resident("VmRSS")
            forget_peak()
            with open_tracker(study.mlflow) as tracker:
                outcome = run_scan(prepare_scan(study), watch, tracker)
            assert outcome.num_done == CHECKPOINTS * factor
            assert watch.first is not None
            found[factor].append(
                {
                    "seconds": time.monotonic() - watch.first,
                    "bytes": resident("VmHWM") - before,
                    "actor_bytes": watch.largest,
                }
            )
            say(f"{outcome.num_done} checkpoints: {found[factor][-1]}")
    found[FACTORS[0]] = found[FACTORS[0]][1:]
    return [
        {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for runs in found.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each size")
    parser.add_argument("--cell", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(score(*options.cell, options.rounds)))
        return

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    table: dict[str, list[dict[str, float]]] = {}
    for what, cells in sizes().items():
        table[what] = []
        for cell in cells:
            command = [sys.executable, __file__, "--rounds", str(options.rounds), "--cell"]
            answer = subprocess.run(
                [*command, *map(str, cell)], check=True, capture_output=True, text=True
            )
            table[what].append(json.loads(answer.stdout.splitlines()[-1]))
            say(f"{what} {cell}: {table[what][-1]}")
    table["checkpoints"] = scan(max(1, options.rounds // 2), say)

    ratios: dict[str, float] = {}
    for what, row in table.items():
        for key in row[0]:
            for factor, cell in zip(FACTORS[1:], row[1:], strict=True):
                ratios[f"{what}.{key}.{factor}x"] = cell[key] / row[0][key]
    print(f"{'':17} {'seconds at 1×, 4×, 16×':>30} {'MB at 1×, 4×, 16×':>30}")
    for what, row in table.items():
        seconds = "  ".join(f"{cell['seconds']:8.3f}" for cell in row)
        megabytes = "  ".join(f"{cell['bytes'] / 1e6:8.1f}" for cell in row)
        print(f"{what:17} {seconds:>30} {megabytes:>30}")
    actors = "  ".join(f"{cell['actor_bytes'] / 1e6:8.1f}" for cell in table["checkpoints"])
    print(f"{'  largest actor':17} {'':>30} {actors:>30}")
    if options.json:
        shown = {name: round(value, 3) for name, value in ratios.items()}
        print(json.dumps({"ratios": shown, "table": table, "load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
