"""A scan with a wanted precision: rounds of more and more instances, until it is reached."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_scans import make_study

from ke_ray.core.jackknife import paired_difference
from ke_ray.engine.scan.run import run_scan
from ke_ray.errors import ResultsError
from ke_ray.outcomes import Display
from ke_ray.planning.scan import prepare_scan
from ke_ray.report.precision import precision_sentence
from ke_ray.report.sources import find_results
from ke_ray.results import ScanFolder, read_manifest
from ke_ray.results.status import read_status
from ke_ray.tracking.tracker import open_tracker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
N, CHECKPOINTS = 512, 4


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(2, 128, (N, 24)).astype(np.uint16))
    return path


class Counter(Display):
    """Counts checkpoints that ended, and interrupts the scan at one of them."""

    def __init__(self, interrupt_at=None):
        self.num_ended, self.interrupt_at = 0, interrupt_at

    def ended(self, name, rows):
        self.num_ended += 1
        if self.num_ended == self.interrupt_at:
            raise KeyboardInterrupt


def run(study, display=None):
    with open_tracker(study.mlflow) as tracker:
        return run_scan(prepare_scan(study), display or Counter(), tracker)


def rows_of(study):
    rows = ScanFolder.open(study.output).entropy().to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    return rows


def paired_errors(study):
    folder = ScanFolder.open(study.output)
    values = {r["checkpoint"]: r["value"] for r in rows_of(study) if r["layer"] is None}
    left_out = {name: [] for name in values}
    for row in folder.replicates().sort_by("group").to_pylist():
        if row["layer"] is None:
            left_out[row["checkpoint"]].append(row["value"])
    sizes = folder.manifest["corpora"]["ids"]["group_sizes"] or [N // 64] * 64
    first = "step10"
    errors = [
        paired_difference(values[first], left_out[first], values[c], left_out[c], sizes)[1]
        for c in values
    ]
    return float(max(errors)), float(np.ptp([*values.values()]))


@pytest.fixture(scope="module")
def make(series, ids, tmp_path_factory):
    def make_one(**keys):
        output = tmp_path_factory.mktemp("rounds") / "scan"
        keys = {"num_instances": N, "measures": ("knowledge_entropy",), "batch_size": 64, **keys}
        return make_study(series, ids, output, **keys)

    return make_one


@pytest.fixture(scope="module")
def pilot(ray_cluster, make):
    """A scan whose first round is precise enough: (study, its error, its change)."""
    study = make(stderr_nats=100.0)
    run(study)
    return study, *paired_errors(study)


@pytest.fixture(scope="module")
def reached(pilot, make):
    """A scan that needs a second round: (study, display)."""
    study, display = make(stderr_nats=pilot[1] / 1.2), Counter()
    run(study, display)
    return study, display


def test_a_wide_precision_takes_the_first_round_alone(pilot):
    assert {row["num_instances"] for row in rows_of(pilot[0])} == {64}
    assert read_manifest(pilot[0].output, "scan")["status"] == "finished"


def test_a_narrow_precision_takes_as_many_instances_as_it_needs(pilot, reached):
    study, display = reached
    counts = {row["num_instances"] for row in rows_of(study)}
    assert counts == {128}
    assert display.num_ended == 2 * CHECKPOINTS
    assert paired_errors(study)[0] <= study.stderr_nats
    assert run(study).num_skipped == CHECKPOINTS


@pytest.mark.parametrize("interrupt_at", [CHECKPOINTS, CHECKPOINTS + 2])
def test_a_scan_that_was_interrupted_in_any_round_comes_to_the_same(make, reached, interrupt_at):
    study = make(stderr_nats=reached[0].stderr_nats)
    with pytest.raises(KeyboardInterrupt):
        run(study, Counter(interrupt_at))
    counts = read_status(study.output)[0]
    done_of_round = interrupt_at % CHECKPOINTS or CHECKPOINTS
    assert counts.done == done_of_round
    assert run(study).exit_code == 0
    assert rows_of(study) == rows_of(reached[0])


def test_a_folder_has_one_rule(reached):
    for keys in ({"stderr_nats": None}, {"stderr_nats": 1e-3}):
        with pytest.raises(ResultsError, match="stderr_nats"):
            prepare_scan(reached[0].model_copy(update=keys))


def test_results_say_how_many_instances_a_wanted_precision_needs(reached):
    study = reached[0]
    sentence = precision_sentence(find_results([study.output])[0], "ids")
    error, change = paired_errors(study)
    needed = int(np.ceil(128 * (error / study.stderr_nats) ** 2))
    assert f"with N = 128; {study.stderr_nats:g} nats needs N of about {needed:,}." in sentence
    assert f"{100 * error / change:.2g} % of the largest change" in sentence
