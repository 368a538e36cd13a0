"""A scan with a wanted precision: rounds of more and more instances, until it is reached."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_scans import make_study

from ke_ray.engine.scan.run import run_scan
from ke_ray.outcomes import Display
from ke_ray.planning.scan import prepare_scan
from ke_ray.results import ScanFolder
from ke_ray.tracking.tracker import open_tracker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
N, CHECKPOINTS = 512, 4


class Counter(Display):
    """Counts checkpoints that ended."""

    num_ended = 0

    def ended(self, name, rows):
        self.num_ended += 1


def test_a_scan_goes_on_to_the_round_that_its_precision_needs(series, tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(2, 128, (N, 24)).astype(np.uint16))
    keys = {"num_instances": N, "measures": ("knowledge_entropy",), "stderr_nats": 0.012}
    study, display = make_study(series, ids, tmp_path / "scan", **keys), Counter()
    with open_tracker(study.mlflow) as tracker:
        outcome = run_scan(prepare_scan(study), display, tracker)
    assert (outcome.exit_code, outcome.num_done) == (0, CHECKPOINTS)
    assert display.num_ended == 2 * CHECKPOINTS  # 64 instances have an error of 0.014 nats
    rows = ScanFolder.open(study.output).entropy().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["num_instances"] for row in rows} == {128}
    assert prepare_scan(study).works == []
