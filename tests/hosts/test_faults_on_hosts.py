"""The short form of ``host_faults.py``: twenty faults of hosts, wires and servers meet scans."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from host_bed import running_bed
from host_events import EVENTS
from host_faults import HostOutcome, disturb, undisturbed
from lab_cluster import LabCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_INJECTIONS = 20
#: All but the head's loss, which would take the cluster from the tests that share it.
KINDS = sorted(set(EVENTS) - {"head"})


def test_twenty_faults_change_no_result_and_leave_nothing(
    three_hosts: LabCluster, tmp_path: Path
) -> None:
    met = 0
    with running_bed(three_hosts, tmp_path, {"scan"}) as bed:
        expected = undisturbed(bed, "scan")
        for seed in itertools.count():
            rng = random.Random(f"twenty {seed}")
            kinds = rng.sample(KINDS, len(KINDS))
            outcome = HostOutcome(seed, "scan", commit="")
            disturb(bed, outcome, kinds, rng, expected, longest_s=1.0)
            assert outcome.problems == [], outcome
            met += outcome.injections
            if met >= NUM_INJECTIONS:
                break
