"""Studies on a head without CPUs and two nodes of one CPU that declare a GPU each.

torch has no CUDA here, which a declared GPU does not change.
"""

from __future__ import annotations

import functools
import http.server
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray_head
import torch
from command_process import Command, start_command
from tiny_scans import make_checkpoint
from tiny_studies import tiny_continual, tiny_pretrain, write_study

from ke_ray.results import read_manifest
from ke_ray.storage import read_table

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here"),
]


@dataclass
class Cluster:
    """Its head, and commands whose driver joins it."""

    head: ray_head.Head

    @property
    def environment(self) -> dict[str, str]:
        """That of a driver which joins."""
        return self.head.environment | {"RAY_ADDRESS": self.head.gcs}

    def start(self, *arguments: object, **environment: str) -> Command:
        """A command in the background."""
        return start_command(
            arguments,
            self.head.folder / f"{uuid.uuid4().hex}.txt",
            environment=self.environment | environment,
            cwd=self.head.folder,
        )

    def messages(self, *arguments: object) -> str:
        """What a command said on one line; it has to end well."""
        command = self.start(*arguments)
        assert command.wait() == 0, command.stdout
        return " ".join(command.stdout.split())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        ray_head.running_head(num_cpus=0) as head,
        ray_head.joined_node(head, "one", num_cpus=1, num_gpus=1),
        ray_head.joined_node(head, "two", num_cpus=1, num_gpus=1),
    ):
        yield Cluster(head)


def test_a_scan_scores_on_cpus_and_says_so_once(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 300, (40, 24), np.uint16))
    messages = cluster.messages(
        *("scan", pretrained / "checkpoints", "--data", f"ids={tmp_path / 'ids.npy'}"),
        *("--num-instances", 40, "--sequence-length", 24, "--measures", "knowledge_entropy"),
        *("--output", tmp_path / "scan", "--dtype", "auto", "--no-mlflow"),
    )
    # Each node is asked what torch can do there, not what it declares.
    assert read_manifest(str(tmp_path / "scan"))["identity"]["dtype"] == "float32"
    assert "dtype: auto is float32 here" in messages
    rows = read_table(str(tmp_path / "scan" / "entropy.parquet")).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert messages.count("Ray granted a GPU on the node") == 1
    assert "built without CUDA: this scorer, and others like it, scores on CPUs" in messages


def test_a_scan_takes_no_gpu_or_nothing_else(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 300, (8, 24), np.uint16))
    words = (
        *("scan", pretrained / "checkpoints", "--data", f"ids={tmp_path / 'ids.npy'}"),
        *("--num-instances", 8, "--sequence-length", 24, "--measures", "knowledge_entropy"),
        *("--limit", 1, "--no-mlflow"),
    )
    said = cluster.messages(*words, "--device", "cpu", "--output", tmp_path / "on_cpus")
    assert "GPU" not in said
    command = cluster.start(*words, "--device", "cuda", "--output", tmp_path / "on_gpus")
    assert command.wait() == 1, command.stdout
    (row,) = read_table(str(tmp_path / "on_gpus" / "entropy.parquet")).to_pylist()
    assert row["status"] == "failed"
    assert "built without CUDA, and the study's device is cuda" in row["error"]


def test_a_scan_waits_for_gpus_that_no_node_has(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 300, (8, 24), np.uint16))
    command = cluster.start(
        *("scan", pretrained / "checkpoints", "--data", f"ids={tmp_path / 'ids.npy'}"),
        *("--num-instances", 8, "--sequence-length", 24, "--measures", "knowledge_entropy"),
        *("--device", "cuda", "--no-mlflow", "--output", tmp_path / "out"),
        RAY_ADDRESS="local",
        KE_RAY_PLACEMENT_WAIT_S="5",
    )
    assert command.wait() == 1, command.stdout
    said = " ".join(command.stdout.split())
    assert "1 × (1 CPU and 1 GPU) requested" in said
    assert "No node of the cluster can hold what the work needs" in said


class HeldSite(http.server.SimpleHTTPRequestHandler):
    """The weights of ``step0`` … ``step3`` trickle until they are released."""

    released = threading.Event()

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        if not re.search("/step[0-3]/model.safetensors", self.path):
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        while len(data) > 1 and not self.released.wait(0.5):
            self.wfile.write(data[:1])
            data = data[1:]
        self.wfile.write(data)


def test_a_node_that_joins_a_scan_takes_the_checkpoints_that_are_left(
    cluster: Cluster, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(2, 98, dtype=np.uint16).reshape(4, 24))
    for number in range(8):
        make_checkpoint(tmp_path / f"step{number}", seed=number)
    handler = functools.partial(HeldSite, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{site.server_port}"
        rows = [f"{number},{base}/step{number}" for number in range(8)]
        (tmp_path / "list.csv").write_text("\n".join(["step,url", *rows]) + "\n")
        command = cluster.start(
            *("scan", tmp_path / "list.csv", "--data", f"ids={tmp_path / 'ids.npy'}"),
            *("--num-instances", 4, "--sequence-length", 24, "--measures", "knowledge_entropy"),
            *("--device", "cpu", "--num-actors", 2, "--set", "max_actors=3", "--no-mlflow"),
            *("--cache-dir", tmp_path / "cache", "--output", tmp_path / "out"),
        )
        # Two scorers hold two checkpoints each, which do not arrive: the others are a third one's.
        with ray_head.joined_node(cluster.head, "late", num_cpus=1):
            deadline = time.monotonic() + 300
            while len(list((tmp_path / "out" / "coefficients").glob("step*"))) < 4:
                assert command.returncode is None, command.stdout
                assert time.monotonic() < deadline, command.stdout
                time.sleep(0.2)
            HeldSite.released.set()
            assert command.wait() == 0, command.stdout
        site.shutdown()
    rows = read_table(str(tmp_path / "out" / "entropy.parquet")).to_pylist()
    totals = [(row["step"], row["status"]) for row in rows if row["layer"] is None]
    assert sorted(totals) == [(number, "ok") for number in range(8)]


def test_pretraining_with_a_worker_on_each_node_follows_one_worker(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    study = tiny_pretrain(tmp_path / "out", num_workers=2, micro_batch_size=2)
    messages = cluster.messages("pretrain", write_study(study, tmp_path / "study.yaml"))
    assert "Training runs on CPUs" in messages
    assert (tmp_path / "out" / "checkpoints" / "step10" / "model.safetensors").is_file()
    both, one = (
        read_table(str(folder / "train.parquet")).column("loss").to_numpy()
        for folder in (tmp_path / "out", pretrained)
    )
    np.testing.assert_allclose(both, one, atol=1e-5)


WAITS = """
import logging, signal, threading, time
import ray
from ray.util import placement_group, remove_placement_group
from ke_ray.engine.cluster.placement_watch import watch_placement
from ke_ray.engine.cluster.session import ray_session
from ke_ray.errors import PlacementError

logging.basicConfig()
with ray_session():
    holder = placement_group([{"CPU": 1}, {"CPU": 1}])
    assert holder.wait(60)
    with watch_placement():
        waiting = placement_group([{"CPU": 1, "GPU": 1}])
        threading.Timer(3.5, remove_placement_group, [holder]).start()
        assert waiting.wait(60)
    remove_placement_group(waiting)
    started = time.monotonic()
    try:
        with watch_placement():
            placement_group([{"CPU": 4}]).wait(25)  # no signal ends it
    except PlacementError as error:
        print(f"ended: {error}")
"""


def test_a_wait_is_told_and_a_hopeless_one_ends(cluster: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=cluster.environment | {"KE_RAY_PLACEMENT_WAIT_S": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    has = "2 nodes with 1 CPU and 1 GPU, 1 node with 0 CPUs"
    busy, *_, hopeless = [line for line in done.stderr.splitlines() if "Waiting" in line]
    assert f"1 × (1 CPU and 1 GPU) requested, the cluster has {has}." in busy
    assert "when other work releases" in busy
    assert "(0 s so far): 1 × (4 CPUs) requested" in hopeless
    assert "No node can hold it; this ends in 2 s" in hopeless
    assert "ended: No node of the cluster can hold what the work needs: 1 × (4 CPUs) req" in (
        done.stdout
    )


def test_a_study_that_lost_its_node_ends_with_a_message(
    cluster: Cluster, pretrained: Path, tmp_path: Path
) -> None:
    study = tiny_continual(
        tmp_path / "out",
        pretrained,
        executor="ray",
        starts={"steps": "10:"},
        cpus_per_worker=4,
        epochs=1000,
        save_every=1,
    )
    with ray_head.joined_node(cluster.head, "large", num_cpus=4):
        file = write_study(study, tmp_path / "study.yaml")
        command = cluster.start("continual", file, KE_RAY_PLACEMENT_WAIT_S="3")
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out").rglob("state.json")):
            assert command.returncode is None, command.stdout
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert command.wait() == 1, command.stdout
    said = " ".join(command.stdout.split())
    assert "declares GPUs, but torch" in said
    assert "Training runs on CPUs" in said
    assert "Waiting for a place" in command.stdout
    assert "ke-ray: No node of the cluster can hold what the work needs: 1 × (4 CPUs)" in (
        command.stdout
    )
    assert not (tmp_path / "out" / "runs.parquet").exists()
