"""A host that joins while a scan runs takes its share of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import s3fs
import yaml
from lab_cluster import BUCKET, LabCluster
from lab_studies import STORE
from tiny_scans import make_checkpoint

from ke_ray.results import ScanFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_CHECKPOINTS = 10


def test_a_host_that_joins_half_way_scores_and_each_value_is_there_once(
    cluster: LabCluster, tmp_path: Path
) -> None:
    for number in range(NUM_CHECKPOINTS):
        make_checkpoint(tmp_path / "elastic" / f"step{number}", seed=number)
    np.save(tmp_path / "elastic" / "ids.npy", np.arange(2, 98, dtype=np.uint16).reshape(4, 24))
    s3fs.S3FileSystem().put(f"{tmp_path}/elastic/", f"{BUCKET}/elastic/", recursive=True)
    study = {
        "kind": "scan",
        "checkpoints": {"spec": f"{STORE}/elastic/step*"},
        "data": {"ids": f"{STORE}/elastic/ids.npy"},
        "num_instances": 4,
        "sequence_length": 24,
        "measures": ["knowledge_entropy"],
        "num_actors": 2,
        "max_actors": 3,
        "cache_dir": "/tmp/elastic_cache",  # each host's own
        "output": f"{STORE}/elastic/scan",
        "mlflow": {"enabled": False},
    }
    head, log = cluster.lab.hosts["h1"], tmp_path / "scan.log"
    head.path("/tmp/elastic.yaml").write_text(yaml.safe_dump(study))
    command = ["python", "-m", "ke_ray", "scan", "/tmp/elastic.yaml"]
    scan = head.start(command, log, cluster.environment)

    def wait_for(what: str, is_so: object) -> None:
        deadline = time.monotonic() + 300
        while not is_so():
            assert scan.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{what} did not come: {log.read_text()}"
            time.sleep(0.2)

    wait_for("the start", lambda: "scan: 0 done" in log.read_text())
    cluster.lab.cut("store")  # two scorers wait with two checkpoints each, and six are left
    try:
        late = cluster.join("h5", "--num-cpus=2")
        wait_for("its scorer", lambda: late.address in cluster.addresses_of("CheckpointScorer"))
    finally:
        cluster.lab.mend("store")
    assert scan.wait(300) == 0, log.read_text()
    assert "No node can hold it" not in log.read_text(), "growing is not waiting"
    rows = ScanFolder.open(study["output"]).entropy().to_pylist()
    totals = [(row["step"], row["status"]) for row in rows if row["layer"] is None]
    assert sorted(totals) == [(number, "ok") for number in range(NUM_CHECKPOINTS)]
    fetched = late.path("/tmp/elastic_cache").rglob("model.safetensors")
    assert list(fetched), "the late host fetched nothing to score"
