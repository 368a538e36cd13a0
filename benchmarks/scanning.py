"""What Ray costs a scan, how a checkpoint is loaded, and how long a scan takes to start.

    python benchmarks/scanning.py [--json] [--rounds 16] [--only ray,loading,start] [--equal]

1. The real scan engine against a loop written by hand, over the same checkpoints and with the same
   number of threads in each process: one actor against one process, two actors against two
   processes without Ray. The contenders run in turns of three seconds (``time_slices.py``); the
   other's whole process tree is stopped meanwhile. The time between two finished checkpoints, on
   a contender's own clock, is one pair of numbers: ``--rounds`` pairs, after one checkpoint per
   worker that is not counted since it holds the start of the actors. The loop runs with glibc's
   own settings, as anyone would run it; ``--equal`` gives it those of the engine's workers.
2. Loading (``scan_loading.py``): bytes read per weight byte, memory while loading, and the
   scorer's idle share when the next checkpoint comes from a slow server.
3. The parts of the time from the command to the first scored token.

OLMo shape: 6 layers, d_model 384, d_mlp 1,536, vocabulary 16,384 (107 MB in float32), random
weights; as many instances of 1,024 tokens as make an item last six seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine's workers have it

import numpy as np
from interleaved import Ratio, ratio
from scan_loading import measure_loading
from scan_world import (
    MEASURES,
    THREADS,
    Quiet,
    Times,
    calibrate,
    make_study,
    run_engine,
    save_checkpoint,
    save_corpus,
)
from time_slices import Contender, race

from ke_ray.engine.cluster.session import worker_env

SLICE_S = 3.0  # a turn


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **values}), flush=True)


class Reporter(Quiet):
    """A scan's progress as events on standard output."""

    def __init__(self, num_workers: int) -> None:
        self._num_before_ready = num_workers

    def ended(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        super().ended(name, rows)
        say("done", checkpoint=name, value=_total(rows))
        self._num_before_ready -= 1
        if self._num_before_ready == 0:
            say("ready")


def _total(rows: Sequence[dict[str, Any]]) -> float:
    return next(
        row["value"]
        for row in rows
        if row["measure"] == "knowledge_entropy" and row["layer"] is None
    )


def run_loop(folder: str, corpus: str, num_instances: int, worker: int, num_workers: int) -> None:
    """What anyone would write: load, score, note, next."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ke_ray.models.scoring import score_model

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS // num_workers)
    ids = torch.from_numpy(np.load(corpus)[:num_instances].astype(np.int64))
    checkpoints = sorted(Path(folder).iterdir())[worker::num_workers]
    with tempfile.TemporaryDirectory() as output:
        for number, path in enumerate(checkpoints):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            found = score_model(model, ids, measures=MEASURES, batch_size=4)
            rows = [vars(row) for row in found.rows]
            Path(output, f"{path.name}.json").write_text(json.dumps(rows))
            say("done", checkpoint=path.name, value=_total(rows))
            if number == 0:
                say("ready")


def periods(contender: Contender, num_workers: int) -> list[float]:
    """Seconds, on its own clock, from one finished checkpoint of a worker to its next.

    With two workers, whose items are equally long and alternate: from the last but one.
    """
    clocks = sorted(
        contender.clock(event["at"]) for event in contender.events if event["event"] == "done"
    )
    return [later - earlier for earlier, later in zip(clocks, clocks[num_workers:], strict=False)]


def compare_with_loop(
    num_workers: int, folder: str, corpus: str, num_instances: int, target: str
) -> tuple[Ratio, dict[str, Any]]:
    """Speed of the engine over that of the loop, pair by pair."""
    script, numbers = str(Path(__file__).resolve()), (str(num_instances), str(num_workers))
    engine = Contender("engine", [[script, "--role", "engine", folder, corpus, *numbers]])
    loops = Contender(
        "loop",
        [
            [script, "--role", f"loop{worker}", folder, corpus, *numbers]
            for worker in range(num_workers)
        ],
    )
    race([engine, loops], SLICE_S)
    values = [
        {e["checkpoint"]: e["value"] for e in contender.events if e["event"] == "done"}
        for contender in (engine, loops)
    ]
    assert values[0].keys() == values[1].keys(), "the two scored different checkpoints"
    ours, by_hand = periods(engine, num_workers), periods(loops, num_workers)
    return ratio(by_hand, ours, target), {
        "threads_per_process": THREADS // num_workers,
        "instances_per_item": num_instances,
        "item_s": round(statistics.median(by_hand), 2),
        "shortest_item_s": round(min(by_hand), 2),
        "speed_over_all": round(sum(by_hand) / sum(ours), 4),
        "cpu_over_all": round(
            engine.cpu_share() * sum(ours) / (loops.cpu_share() * sum(by_hand)), 4
        ),
        "largest_difference_nats": max(abs(values[0][k] - values[1][k]) for k in values[0]),
    }


def play(role: str, arguments: Sequence[str]) -> None:
    if role == "start":
        play_start(*arguments)
        return
    folder, corpus, num_instances, num_workers = arguments
    if role == "engine":
        workers = int(num_workers)
        run_engine(folder, corpus, int(num_instances), workers, Reporter(workers))
    else:
        worker = int(role.removeprefix("loop"))
        run_loop(folder, corpus, int(num_instances), worker, int(num_workers))


def measure_ray(rounds: int) -> tuple[dict[str, Ratio], dict[str, Any]]:
    ratios, details = {}, {}
    with tempfile.TemporaryDirectory() as root:
        corpus = str(save_corpus(Path(root, "ids.npy"), 256))
        for num_workers, target in ((1, ">= 0.95"), (2, ">= 0.9")):
            folder = Path(root, "series")
            for number in range(rounds + num_workers):
                if not (path := folder / f"step{number:04d}").exists():
                    save_checkpoint(path, number)
            num_instances = calibrate(folder / "step0000", corpus, THREADS // num_workers)
            name = f"{num_workers}_actor_over_{num_workers}_process"
            ratios[name], details[name] = compare_with_loop(
                num_workers, str(folder), corpus, num_instances, target
            )
            print(f"{name}: {ratios[name].median:.3f} {details[name]}", file=sys.stderr)
    return ratios, details


def measure_start(rounds: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of the parts between the command and its first result; medians."""
    script, runs = str(Path(__file__).resolve()), []
    with tempfile.TemporaryDirectory() as root:
        for number in range(2):
            save_checkpoint(Path(root, "series", f"step{number}"), number)
        corpus = str(save_corpus(Path(root, "ids.npy"), 1))
        for number in range(rounds + 1):
            command = [sys.executable, script, "--role", "start"]
            started = time.monotonic()
            answer = subprocess.run(
                [*command, f"{root}/series", corpus, f"{root}/out{number}", str(started)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            runs.append(json.loads(answer.stdout.splitlines()[-1]))
    parts = runs[0].keys()  # the first run made MLflow's database and is not counted
    return {part: statistics.median(run[part] for run in runs[1:]) for part in parts}


def play_start(spec: str, corpus: str, output: str, started: str) -> None:
    """What ``ke-ray scan`` does, one instance and the default number of actors."""
    import ke_ray.cli  # noqa: F401
    from ke_ray.api.publish import publish_scan  # noqa: F401
    from ke_ray.cli.progress import TerminalDisplay  # noqa: F401
    from ke_ray.engine.scan.run import run_scan
    from ke_ray.planning.scan import prepare_scan
    from ke_ray.tracking.tracker import open_tracker

    marks = [float(started), time.monotonic()]
    uri = f"sqlite:///{Path(output).parent}/mlflow.db"
    study = make_study(spec, corpus, output, num_instances=1, mlflow={"uri": uri})
    setup = prepare_scan(study)
    marks.append(time.monotonic())
    times = Times()
    with open_tracker(study.mlflow) as tracker:
        outcome = run_scan(setup, times, tracker)
    first = outcome.timings[0]
    ray_started = times.started + outcome.phases_s["ray_start"]
    own = first["fetch_s"] + first["load_s"] + first["wait_s"] + first["score_s"]
    parts = {
        "imports": marks[1] - marks[0],
        "set-up": marks[2] - marks[1],
        "MLflow": times.started - marks[2],
        "Ray": outcome.phases_s["ray_start"],
        "actors": times.done[0] - own - ray_started,
        "load": first["fetch_s"] + first["load_s"],
        "score": first["score_s"],
        "all": times.done[0] - marks[0],
    }
    print(json.dumps(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("--rounds", type=int, default=16, help="checkpoints that are counted")
    parser.add_argument("--only", default="ray,loading,start", help="parts to run")
    parser.add_argument("--equal", action="store_true", help="the workers' settings for the loop")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        play(options.role, options.arguments)
        return
    if options.equal:
        os.environ |= worker_env()
    # Leaves no stopped process behind where the benchmark itself is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ratios: dict[str, Ratio] = {}
    details: dict[str, Any] = {"load_average": os.getloadavg(), "equal": options.equal}
    parts = options.only.split(",")
    if "ray" in parts:
        ratios, details["ray"] = measure_ray(options.rounds)
    measured: dict[str, float] = {}
    if "loading" in parts:
        measured, details["loading"] = measure_loading()
    if "start" in parts:
        details["start_s"] = measure_start()
    for name, value in ratios.items():
        print(f"{name:36} {value.median:.3f} [{value.low:.3f}, {value.high:.3f}]  {value.target}")
    for name, number in measured.items():
        print(f"{name:36} {number:.3f}")
    for name, shown in details.items():
        print(f"{name}: {shown}")
    if options.json:
        import torch

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        found = {name: value.as_json() for name, value in ratios.items()} | measured
        print(json.dumps({"ratios": found, **details, "versions": versions}))


if __name__ == "__main__":
    main()
