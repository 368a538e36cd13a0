"""A job over two nodes: the entry command on one, scorers on both, results at a URI."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

_spec = importlib.util.spec_from_file_location("ray_head", Path(__file__).with_name("ray_head.py"))
ray_head = importlib.util.module_from_spec(_spec)
sys.modules["ray_head"] = ray_head
_spec.loader.exec_module(ray_head)


def alive_nodes(head) -> set[str]:
    found = head.get("/api/v0/nodes", head.token).json()["data"]["result"]["result"]
    return {node["node_id"] for node in found if node["state"] == "ALIVE"}


def test_a_scan_spreads_over_two_nodes(series, token_ids, tmp_path):
    (agent,) = ray_head.free_ports(1)
    with ray_head.running_head(num_cpus=1) as head:
        worker = [
            *(ray_head.RAY, "start", "--block", "--address", head.gcs, "--num-cpus", "1"),
            *("--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(agent)),
            *("--object-store-memory", "150000000", "--disable-usage-stats"),
        ]
        with ray_head.node(worker, head, head.folder / "worker.log"):
            deadline = time.monotonic() + 120
            while len(nodes := alive_nodes(head)) < 2:
                assert time.monotonic() < deadline, (head.folder / "worker.log").read_text()
                time.sleep(0.5)
            output = f"file://{tmp_path}/shared/scan"
            job = {
                "kind": "job",
                "name": "spread",
                "entrypoint": (
                    f"python -m ke_ray scan file://{series} --data ids=file://{token_ids} "
                    "--num-instances 70 --sequence-length 24 --num-actors 2 --no-mlflow "
                    f"--measures knowledge_entropy --output {output}"
                ),
                "working_dir": str(ROOT),
                "runtime_env": str(ROOT / "jobs" / "runtime_env.yaml"),
            }
            (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
            command = [sys.executable, "-m", "ke_ray", "submit", str(tmp_path / "job.yaml")]
            result = subprocess.run(
                [*command, "--address", head.address],
                env=head.environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=400,
            )
            assert result.returncode == 0, result.stdout + result.stderr
            actors = head.get("/api/v0/actors?detail=1", head.token).json()
            scorers = [
                actor
                for actor in actors["data"]["result"]["result"]
                if "CheckpointScorer" in actor["class_name"]
            ]
            assert {actor["node_id"] for actor in scorers} == nodes

    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_model

    rows = {
        row["checkpoint"]: row
        for row in ScanFolder.open(output).entropy().to_pylist()
        if row["layer"] is None
    }
    assert set(rows) == {f"step{n}" for n in (10, 20, 30, 40)}
    import torch

    ids = torch.from_numpy(np.load(token_ids).astype(np.int64))
    for name, row in rows.items():
        expected = score_model(load_model(str(series / name)), ids, measures=["knowledge_entropy"])
        assert row["value"] == pytest.approx(expected.row("knowledge_entropy").value, rel=1e-5)
