"""Finished checkpoints per second whose results a scan writes to S3.

    python benchmarks/results_on_s3.py [--json] [--checkpoints 100] [--latency 0.03]

The collector of a scan gets results in OLMo-1B's shape (16 layers, d_mlp 8192, 64 jackknife
groups, three measures: 0.5 MB of coefficients and 3,264 leave-one-out values for each checkpoint)
as fast as it takes them, and writes them to a local S3 service (moto). A real store answers after
tens of milliseconds, a local one at once: ``--latency`` seconds are added to each of its answers.
The same is timed with one writer thread, as the result thread alone would write.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.engine.scan import collect
from ke_ray.engine.scan.collect import Collector
from ke_ray.outcomes import ScanOutcome
from ke_ray.planning.scan_items import CheckpointWork, CorpusWork
from ke_ray.results.manifest import new_manifest
from ke_ray.results.scan_folder import ScanFolder

MEASURES = ("knowledge_entropy", "attention_entropy", "next_token_entropy")


class Quiet:
    """Takes the place of a run and of a meter."""

    def __getattr__(self, _: str) -> Any:
        return lambda *arguments, **options: None


def collector_for(output: str, num_checkpoints: int, outcome: ScanOutcome) -> Collector:
    """A collector that waits for ``num_checkpoints`` with one corpus each."""
    identity = {"measure_version": 1, "corpora": {"text": "sha"}}
    folder = ScanFolder(output, new_manifest("scan", {}) | {"identity": identity})
    setup: Any = SimpleNamespace(
        folder=folder,
        study=SimpleNamespace(output=output, data={"text": ""}, mlflow=None),
        refs=[CheckpointRef(f"step{n}", "/c", "hf", step=n) for n in range(num_checkpoints)],
        corpora={"text": SimpleNamespace(name="text", sha256="sha")},
        works=[
            CheckpointWork(n, (CorpusWork("text", MEASURES, 64, 2048),))
            for n in range(num_checkpoints)
        ],
        steps_rise=True,
    )
    return Collector(setup, Any, Quiet(), Quiet(), outcome)


def output_of(checkpoint: int, n_layers: int = 16, d_mlp: int = 8192) -> dict[str, Any]:
    """What a scorer returns for a whole checkpoint."""
    layers = [None, *range(n_layers)]
    rows = [
        {"layer": layer, "measure": name, "value": 1.0, "stderr": 0.1, "unit": "nats"}
        for name in MEASURES
        for layer in layers
    ]
    replicates = [
        {"layer": layer, "measure": name, "group": group, "value": 1.0}
        for name in MEASURES
        for layer in layers
        for group in range(64)
    ]
    coefficients = np.random.default_rng(checkpoint).random((n_layers, d_mlp), np.float32)
    return {
        **{"checkpoint": checkpoint, "corpus": "text", "status": "ok", "sums": None},
        **{"start": 0, "stop": 64},
        **{"fetch_s": None, "load_s": None, "score_s": None, "wait_s": None},
        **{"num_instances": 64, "num_tokens": 64 * 2048, "weights_sha256": f"w{checkpoint}"},
        "rows": _ipc(rows),
        "replicates": _ipc(replicates),
        "coefficients": save({"mean_abs_coefficients": coefficients}),
    }


def _ipc(rows: list[dict[str, Any]]) -> bytes:
    table, buffer = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def per_second(output: str, outputs: list[dict[str, Any]], num_writers: int) -> float:
    """Checkpoints per second from the first result to the last file."""
    collect._WRITERS, before = num_writers, collect._WRITERS
    outcome = ScanOutcome(output)
    started = time.monotonic()
    try:
        with collector_for(output, len(outputs), outcome) as collector:
            for one in outputs:
                collector.add(one)
    finally:
        collect._WRITERS = before
    assert outcome.num_done == len(outputs)
    return len(outputs) / (time.monotonic() - started)


def add_latency(seconds: float) -> None:
    """Make every call of s3fs take as long as a store that is further away."""
    import asyncio

    import s3fs

    call = s3fs.S3FileSystem._call_s3

    async def slower(self: Any, *arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(seconds)
        return await call(self, *arguments, **options)

    s3fs.S3FileSystem._call_s3 = slower


def main() -> None:
    """Run, and print checkpoints per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds, of each request")
    options = parser.parse_args()
    from servers import running_s3

    outputs = [output_of(n) for n in range(options.checkpoints)]
    with tempfile.TemporaryDirectory() as folder, running_s3(Path(folder)) as variables:
        os.environ |= variables
        add_latency(options.latency)
        few = outputs[: max(1, options.checkpoints // 4)]
        rates = {
            "one_writer": per_second("s3://shared/one", few, 1),
            "checkpoints_per_s": per_second("s3://shared/many", outputs, collect._WRITERS),
        }
    for name, rate in rates.items():
        print(f"{name:>20} {rate:6.1f} checkpoints/s")
    print(f"{'ratio':>20} {rates['checkpoints_per_s'] / rates['one_writer']:6.1f}")
    if options.json:
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
