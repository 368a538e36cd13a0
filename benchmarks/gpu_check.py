"""Everything that needs a GPU, in one command: the tests marked ``gpu`` and what a card is worth.

    python benchmarks/gpu_check.py [--out runs/gpu_check] [--tiny]          (make gpu-check)

Needs torch, transformers and ke_ray's code, pytest and hypothesis for the tests, and no Ray. Leaves
``gpu_check.json`` and ``gpu_check.md``, a table for ``benchmarks/README.md``:

    scoring      share of the measured matrix peak, bfloat16 (``gpu_scoring.py``)
    attention    time of knowledge and attention entropy over that of knowledge entropy alone
    precision    knowledge entropy in bfloat16, and with TF32, against float32; random weights
    loading      share of a load that is hidden while another model of the shape is scored

at the shapes of OLMo-1B and OLMo-7B. What does not fit on the card is a row that says so.
``--tiny`` runs all of it to its end on a CPU, with sizes that show nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_scoring import measure
from shape import OLMO_1B, OLMO_7B, Shape

from ke_ray.core.precision import matmul_precision
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model
from ke_ray.models.scoring import score_instances, score_model

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(2, 64, 128, 4, 512, 64)
INSTANCES = 4  # of the comparison of dtypes


def row(check: str, shape: str, value: float | str, target: str = "") -> dict[str, Any]:
    return {"check": check, "shape": shape, "value": value, "target": target}


def run_tests() -> dict[str, Any]:
    """The tests marked ``gpu``; files without any are not imported, as they may need Ray."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    marked = [str(path) for path in files if "pytest.mark.gpu" in path.read_text("utf-8")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *marked],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = [line.strip(" =") for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    print("\n".join(lines[-20:] if done.returncode else lines[-1:]), flush=True)
    last = lines[-1] if lines else "no output"
    return row("tests marked gpu", "", last, "all pass") | {"failed": done.returncode != 0}


def instances(shape: Shape, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, shape.vocabulary, (count, shape.length), generator=generator)


def scoring(name: str, shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    result = measure(shape, device, batch=2 if shape is TINY else 8, rounds=3)
    for ratio, value in result["ratios"].items():
        yield row(ratio, name, value, result["targets"].get(ratio, ""))
    yield row("measured peak, TFLOP/s", name, result["peak_flops"] / 1e12)


def precision(name: str, shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    ids = instances(shape, INSTANCES)

    def total(model: Any) -> float:
        rows = score_model(model, ids, batch_size=1).rows
        return sum(r.value for r in rows if r.layer is not None)

    with torch.device(device):
        model = shape.model()
    exact = total(model)
    with matmul_precision("high"):
        yield row("TF32 − float32, nats in all", name, total(model) - exact)
    yield row("bfloat16 − float32, nats in all", name, total(model.bfloat16()) - exact)


def loading(name: str, shape: Shape, device: str) -> Iterator[dict[str, Any]]:
    """Two models on the device: one is scored for about as long as the other loads."""

    def timed(*tasks: Callable[[], object]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(len(tasks)) as pool:
            list(pool.map(lambda task: task(), tasks))
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with torch.device(device):
        model = shape.model().bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "step1")

        def load() -> None:
            load_model(Path(folder) / "step1", dtype=torch.bfloat16, device=device)

        load()
        load_s = timed(load)
        count, score_s = 1, 0.0
        while score_s < load_s and count < 4096:
            count *= 2
            ids = instances(shape, count)

            def score(ids: torch.Tensor = ids) -> None:
                score_instances(
                    model, ids, measures="knowledge_entropy", num_instances=len(ids), batch_size=8
                )

            score_s = timed(score)
        both_s = timed(load, score)
    yield row("seconds of a load", name, load_s)
    yield row("loading hidden", name, (load_s + score_s - both_s) / load_s, ">= 0.95")


def run_checks(device: str, shapes: dict[str, Shape]) -> Iterator[dict[str, Any]]:
    for name, shape in shapes.items():
        for check in (scoring, precision, loading):
            try:
                yield from check(name, shape, device)
            except torch.OutOfMemoryError as error:
                yield row(check.__name__, name, f"does not fit: {str(error).splitlines()[0]}")
            if device != "cpu":
                torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    head = f"{result['device']}, torch {result['torch']}, {result['date']}"
    lines = [head, "", "| check | shape | value | target |", "|---|---|---|---|"]
    for r in result["rows"]:
        value = f"{r['value']:.4g}" if isinstance(r["value"], float) else r["value"]
        lines.append(f"| {r['check']} | {r['shape']} | {value} | {r['target']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit(
            "no CUDA device here; this check needs one (or --tiny, which shows only that it runs)"
        )
    device = "cpu" if options.tiny else "cuda"
    shapes = {"tiny": TINY} if options.tiny else {"1B": OLMO_1B, "7B": OLMO_7B}
    tests = run_tests()
    rows = [tests]
    for measured in run_checks(device, shapes):
        print(*measured.values(), flush=True)
        rows.append(measured)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_check.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "gpu_check.md").write_text(table(result))
    print(f"written to {os.fspath(options.out)}")
    sys.exit(1 if tests["failed"] else 0)


if __name__ == "__main__":
    main()
