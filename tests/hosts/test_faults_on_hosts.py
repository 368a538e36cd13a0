"""The short form of ``host_faults.py``: twenty faults of hosts, wires and servers meet scans."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from host_bed import STORE, Bed, running_bed
from host_events import EVENTS
from host_faults import HostOutcome, check, disturb, undisturbed
from lab_cluster import BUCKET, LabCluster

from ke_ray.storage.ownership import LOCK

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_INJECTIONS = 20
#: Without the head's loss, which would take the cluster from the tests that share it, that of the
#: command, whose lease would be waited for, and MLflow's errors (tests/tracking/test_outages.py).
KINDS = sorted(
    kind for kind in EVENTS if kind not in ("head", "driver") and not kind.startswith("mlflow")
)


@pytest.fixture(scope="module")
def bed(three_hosts: LabCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with running_bed(three_hosts, tmp_path_factory.mktemp("bed"), {"scan"}) as bed:
        yield bed


@pytest.fixture(scope="module")
def expected(bed: Bed) -> dict[Any, Any]:
    """The results of a scan that nothing befalls."""
    return undisturbed(bed, "scan")


@pytest.mark.skipif(
    "KE_RAY_HOST_FAULTS" not in os.environ,
    reason="takes minutes and a machine of its own; KE_RAY_HOST_FAULTS=1 runs it",
)
def test_twenty_faults_change_no_result_and_leave_nothing(
    bed: Bed, expected: dict[Any, Any]
) -> None:
    met = 0
    for seed in itertools.count():
        rng = random.Random(f"twenty {seed}")
        outcome = HostOutcome(seed, "scan", commit="")
        disturb(bed, outcome, rng.choices(KINDS, k=NUM_INJECTIONS), rng, expected, longest_s=1.0)
        assert outcome.problems == [], outcome
        met += outcome.injections
        if met >= NUM_INJECTIONS:
            break


def test_a_store_that_stays_away_ends_a_scan_with_a_message_and_the_next_one_resumes(
    bed: Bed, expected: dict[Any, Any]
) -> None:
    words, log = bed.command("scan", "away"), "/tmp/away.log"
    bed.driver.start(words, log, KE_RAY_STORE_GIVE_UP_S="3")
    while not bed.files.find(f"{BUCKET}/faults/out/away/parts"):  # something is scored
        assert bed.driver.is_running, bed.log("away").read_text()
        time.sleep(0.1)
    bed.set_faults("store", [{"fault": "503", "share": 1.0}])
    code = bed.driver.wait(300)
    bed.set_faults("store", [])
    said = bed.log("away").read_text()
    assert code == 1, said
    assert said.count("ke-ray: ") == 1, said
    assert "Finished work is saved. Run the same command again to resume" in said
    assert "failed:" not in said, "no checkpoint is broken"
    outcome = HostOutcome(0, "scan", commit="")
    lease = f"{STORE}/out/away/{LOCK}"
    if bed.files.exists(lease):  # the store was away: as after the minute in which it expires
        bed.files.rm(lease)
    bed.driver.start(words, log)
    assert bed.driver.wait(300) == 0, bed.log("away").read_text()
    check(bed, outcome, "away", expected)
    assert outcome.problems == []
