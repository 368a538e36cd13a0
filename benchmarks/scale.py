"""How a scan grows: what Ray costs an item, the driver's memory, and when 1 to 128 GPUs are done.

    python benchmarks/scale.py [--only overhead,folding,times,makespan] [--sizes 10,100] [--json]
    python benchmarks/scale.py --only makespan --price 2.50      # what a GPU-hour costs you

1. ``overhead``: the real scan engine over 10, 100 and 1,000 checkpoints that cost nearly nothing
   (one random model of 2 layers and d_model 16 under many names, one instance of 32 tokens), each
   size in a process of its own. Beside it the same loading, scoring and evaluating in a plain loop.
2. ``folding``: seconds and memory of the driver when it folds finished checkpoints into the tables,
   as many rows each as OLMo-1B gives (16 layers, 8 measures, 64 groups).
3. ``times``: seconds to load a model of OLMo-1B's shape and to score an instance of 2,048 tokens.
4. ``makespan``: the engine's own plan of all checkpoints of OLMo-1B and 7B on the paper's D, played
   through with the times below, against the earliest end that is possible.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from shape import OLMO_1B, Shape

from ke_ray.planning.scan_items import CheckpointWork, CorpusWork, load_tokens, makespan, plan_items

NUM_INSTANCES, LENGTH = 2048, 2048  # the paper's D: 4.2M tokens
NUM_SCORERS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Times:
    """Seconds of one scorer with one checkpoint, and where they come from."""

    checkpoints: int
    load_s: float
    score_s: float
    gpu: bool
    fetched: bool
    where: str


def h100(checkpoints: int, gigabytes: float, parameters: float, gigabytes_per_s: float) -> Times:
    """What is assumed of an H100: 600 TFLOP/s, 2 operations a weight and token, 1.28 of that for
    all measures (README.md, Scoring)."""
    score_s = 1.28 * 2 * parameters * NUM_INSTANCES * LENGTH / 6e14
    load_s = gigabytes / gigabytes_per_s
    return Times(checkpoints, load_s, score_s, True, gigabytes_per_s < 1, "assumed, not measured")


#: Counts and sizes of the published lists: 4.71 GB and 27.5 GB, float32.
TIMES = {
    "1B, 2 CPU cores": Times(351, 0.3, 2048 * 43.0, False, False, "--only times, 2026-11-23"),
    "1B, H100, 1 GB/s": h100(351, 4.71, 1.18e9, 1.0),
    "1B, H100, 0.1 GB/s": h100(351, 4.71, 1.18e9, 0.1),
    "7B, H100, 1 GB/s": h100(527, 27.5, 6.69e9, 1.0),
    "7B, H100, 0.1 GB/s": h100(527, 27.5, 6.69e9, 0.1),
}


def tiny_series(root: Path, number: int) -> tuple[str, str]:
    """One tiny checkpoint under ``number`` names, and one short instance."""
    Shape(2, 16, 32, 2, 64, 32).model().save_pretrained(root / "model")
    (root / "series").mkdir()
    for index in range(number):
        (root / "series" / f"step{index}").symlink_to(root / "model")
    np.save(root / "ids.npy", np.arange(2, 34, dtype=np.uint16)[None])
    return str(root / "series"), str(root / "ids.npy")


class Watch:
    """A scan's progress display that notes when each checkpoint was done, and this process' RSS."""

    def __init__(self) -> None:
        import psutil

        self.done: list[float] = []
        self.rss: list[float] = []
        self._process = psutil.Process()

    def start(self, **_: Any) -> None:
        """Of no interest."""

    def tokens(self, num_tokens: int, *_: Any) -> None:
        """Once a second."""
        self.rss.append(self._process.memory_info().rss / 2**20)

    def ended(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """One more is done."""
        assert all(row["status"] == "ok" for row in rows), rows
        self.done.append(time.monotonic())

    def stop(self) -> None:
        """Of no interest."""


def run_engine(number: int) -> dict[str, float]:
    """The real engine over ``number`` checkpoints; two scorers of one thread."""
    from ke_ray.engine.scan.run import run_scan
    from ke_ray.planning.scan import prepare_scan
    from ke_ray.studies.scan import ScanStudy
    from ke_ray.tracking.tracker import open_tracker

    with tempfile.TemporaryDirectory() as root:
        spec, ids = tiny_series(Path(root), number)
        study = ScanStudy.model_validate(
            {
                "checkpoints": {"spec": spec},
                "data": {"ids": ids},
                "num_instances": 1,
                "sequence_length": 32,
                "num_actors": 2,
                "output": str(Path(root, "scan")),
                "mlflow": {"enabled": False},
            }
        )
        watch, cpu = Watch(), time.process_time()
        with open_tracker(study.mlflow) as tracker:
            outcome = run_scan(prepare_scan(study), watch, tracker)
        assert outcome.num_done == number
        cpu = time.process_time() - cpu
    gaps = np.diff(watch.done)
    tenth = max(1, len(gaps) // 10)
    return {
        "checkpoints": number,
        **{f"{name}_s": seconds for name, seconds in outcome.phases_s.items()},
        "first_s": outcome.phases_s["scoring"] - (watch.done[-1] - watch.done[0]),
        "item_ms": 1e3 * float(gaps.mean()),
        "item_first_tenth_ms": 1e3 * float(gaps[:tenth].mean()),
        "item_last_tenth_ms": 1e3 * float(gaps[-tenth:].mean()),
        "driver_cpu_ms": 1e3 * cpu / number,
        "rss_start_mib": watch.rss[0],
        "rss_half_mib": watch.rss[len(watch.rss) // 2],
        "rss_most_mib": max(watch.rss),
        "threads": threading.active_count(),
    }


def run_loop(number: int) -> dict[str, float]:
    """What a scorer does with an item, without Ray, in one process of one thread."""
    import torch

    from ke_ray.checkpoints.formats.fingerprint import weights_sha256
    from ke_ray.core.measures import DEFAULT_MEASURES, evaluate
    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_instances

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        _, ids = tiny_series(Path(root), 1)
        rows, times = np.load(ids).astype(np.int32), []
        for _ in range(number):
            started = time.monotonic()
            weights_sha256(str(Path(root, "model")))
            sums = score_instances(
                load_model(Path(root, "model")),
                rows,
                None,
                measures=DEFAULT_MEASURES,
                num_instances=1,
                batch_size=4,
            )
            evaluate(sums, DEFAULT_MEASURES)
            times.append(time.monotonic() - started)
    return {"checkpoints": number, "item_ms": 1e3 * statistics.median(times)}


def run_folding(number: int) -> dict[str, float]:
    """Write ``number`` checkpoints with as many rows as OLMo-1B's, and fold them, 32 at a time."""
    import resource

    import psutil
    import pyarrow as pa

    from ke_ray.core.measures import DEFAULT_MEASURES
    from ke_ray.results.scan_folder import REPLICATES_SCHEMA, ScanFolder

    rng = np.random.default_rng(0)
    places = [(layer, m) for layer in (None, *range(16)) for m in DEFAULT_MEASURES]
    times, rss = [], []
    with tempfile.TemporaryDirectory() as root:
        folder = ScanFolder(root, {"kind": "scan", "identity": {"corpora": {"D": ""}}})
        for step in range(number):
            name = f"step{step}"
            common = {"checkpoint": name, "step": step, "corpus": "D"}
            rows = [{**common, "layer": layer, "measure": m} for layer, m in places]
            results = {"value": 1.0, "stderr": 0.1, "weights_sha256": f"{step:064}", "status": "ok"}
            groups = [
                {**row, "group": group, "value": rng.random()}
                for row in rows
                for group in range(64)
            ]
            replicates = pa.Table.from_pylist(groups, REPLICATES_SCHEMA)
            folder.write_part(name, [row | results for row in rows], replicates)
            if step % 32 == 31:
                started = time.monotonic()
                folder.consolidate()
                times.append(time.monotonic() - started)
                rss.append(psutil.Process().memory_info().rss / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "checkpoints": number,
        "last_fold_s": times[-1],
        "rss_first_mib": rss[0],
        "rss_last_mib": rss[-1],
        "rss_peak_mib": peak,
    }


def measure_times() -> dict[str, float]:
    """Load and score a model of OLMo-1B's shape, float32, on all cores."""
    import torch
    from transformers import OlmoForCausalLM

    from ke_ray.core.measures import DEFAULT_MEASURES
    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_instances

    with tempfile.TemporaryDirectory() as root:
        with torch.device("meta"):
            model = OlmoForCausalLM(OLMO_1B.config())
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        model.save_pretrained(root)
        del model
        started = time.monotonic()
        loaded = load_model(Path(root))
        load_s = time.monotonic() - started
    ids = np.random.default_rng(0).integers(2, 50000, (1, LENGTH)).astype(np.int32)
    started = time.monotonic()
    score_instances(loaded, ids, None, measures=DEFAULT_MEASURES, num_instances=1, batch_size=1)
    return {"load_s": load_s, "score_s_per_instance": time.monotonic() - started}


def earliest_end_s(num_scorers: int, times: Times) -> float:
    """A bound that no plan can beat, loading for one item while another is scored.

    Nobody scores before a load. Somebody loads k = ⌈checkpoints / scorers⌉ times. Of k·scorers
    loads those beyond one per checkpoint serve cuts; where even so a whole checkpoint must be
    somebody's k-th load, it is scored after that (or somebody loads once more).
    """
    rounds = -(-times.checkpoints // num_scorers)
    last = 0.0
    if 2 * times.checkpoints > (2 * rounds - 1) * num_scorers:
        last = min(times.score_s, times.load_s)
    full_speed = times.load_s + times.checkpoints * times.score_s / num_scorers
    return max(full_speed, rounds * times.load_s + last)


def simulate(price: float | None) -> list[dict[str, Any]]:
    """Makespan, bound and scorer-hours of the engine's plan."""
    work = CorpusWork("D", ("knowledge_entropy",), NUM_INSTANCES, LENGTH)
    found = []
    for name, times in TIMES.items():
        works = [CheckpointWork(index, (work,)) for index in range(times.checkpoints)]
        tokens_per_s = NUM_INSTANCES * LENGTH / times.score_s
        cost = load_tokens(gpu=times.gpu, fetched=times.fetched)
        for number in NUM_SCORERS:
            items = plan_items(works, number, cost)
            end_s = makespan(items, number, times.load_s * tokens_per_s) / tokens_per_s
            bound_s = earliest_end_s(number, times)
            row = {
                "times": name,
                "scorers": number,
                "items": len(items),
                "hours": end_s / 3600,
                "bound": bound_s / 3600,
                "ratio": end_s / bound_s,
                "scorer_hours": number * end_s / 3600,
            }
            found.append(row if price is None else row | {"cost": row["scorer_hours"] * price})
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as an aligned table."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    table = [list(rows[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


#: Parts that need a process of their own, and what they are given.
ROLES = {"engine": run_engine, "loop": run_loop, "folding": run_folding}


def in_own_process(role: str, number: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--role", role, "--sizes", str(number)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="overhead,folding,times,makespan", help="parts to run")
    parser.add_argument("--sizes", default="10,100,1000", help="numbers of tiny checkpoints")
    parser.add_argument("--price", type=float, help="of a GPU-hour, for a column of costs")
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    if options.role:
        print(json.dumps(ROLES[options.role](sizes[0])))
        return
    results: dict[str, Any] = {"load_average": os.getloadavg(), "python": platform.python_version()}
    parts = options.only.split(",")
    if "overhead" in parts:
        results["loop"] = [in_own_process("loop", 100)]
        show(results["loop"])
        results["overhead"] = []
        for size in sizes:
            results["overhead"].append(in_own_process("engine", size))
            show(results["overhead"][-1:])
    if "folding" in parts:
        results["folding"] = [in_own_process("folding", size) for size in (32, 352)]
        show(results["folding"])
    if "times" in parts:
        results["times"] = [measure_times()]
        show(results["times"])
    if "makespan" in parts:
        results["makespan"] = simulate(options.price)
        show(results["makespan"])
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
