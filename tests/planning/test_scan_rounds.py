"""Rounds of a scan with a wanted precision; the test scores what Ray's actors would."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_scans import make_study

from ke_ray.core.jackknife import paired_difference
from ke_ray.engine.cluster.metrics import ScanMeter
from ke_ray.engine.scan.collect import Collector
from ke_ray.errors import ResultsError, StoreOutageError
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_instances
from ke_ray.outcomes import Display, ScanOutcome
from ke_ray.planning.scan import go_on, prepare_scan
from ke_ray.planning.scan_items import plan_items
from ke_ray.planning.scan_messages import OUTAGE, ScorerSettings, evaluated_columns, failed_table
from ke_ray.report.precision import precision_sentence
from ke_ray.report.sources import find_results
from ke_ray.results import ScanFolder, read_manifest
from ke_ray.results.status import read_status
from ke_ray.tracking.tracker import open_tracker

N, CHECKPOINTS = 512, 4


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(2, 128, (N, 24)).astype(np.uint16))
    return path


def run(study, interrupt_at=None):
    """The scan in this process; returns how many checkpoints were scored, over all rounds."""
    setup, outcome, num_scored = prepare_scan(study), ScanOutcome(study.output), 0
    settings = ScorerSettings(
        dtype=study.dtype,
        batch_size=study.batch_size,
        top_k_fraction=study.top_k_fraction,
        dormant_threshold=study.dormant_threshold,
        device="cpu",
        threads=None,
        cache_dir=None,
        cache_bytes=None,
    )
    setup.folder.consolidate()
    while setup.works:
        meter = ScanMeter(Display(), outcome, "rounds", setup.works)
        with open_tracker(study.mlflow) as tracker:
            run = tracker.run(None)
        with Collector(setup, settings, run, meter, outcome) as collector:
            for work in setup.works:
                if num_scored == interrupt_at:
                    return num_scored
                num_scored += 1
                (part,) = work.corpora
                corpus = setup.corpora[part.corpus]
                sums = score_instances(
                    load_model(setup.refs[work.index].location),
                    corpus.input_ids,
                    corpus.lengths,
                    measures=part.measures,
                    num_instances=part.num_instances,
                    group_sizes=part.group_sizes,
                    batch_size=study.batch_size,
                )
                output = {
                    **{"checkpoint": work.index, "corpus": part.corpus},
                    **{"status": "ok", "sums": None, "start": 0, "stop": sums.total_instances},
                    **{"fetch_s": None, "load_s": None, "score_s": None, "wait_s": None},
                    **{"num_instances": sums.total_instances, "num_tokens": sums.total_tokens},
                }
                collector.add({**output, **evaluated_columns(sums, part.measures, settings)})
        if not go_on(setup):
            break
        setup.folder.consolidate()
    setup.folder.consolidate(final=True)
    return num_scored


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
def pilot(make):
    """A scan whose first round is precise enough: (study, its error, its change)."""
    study = make(stderr_nats=100.0)
    run(study)
    return study, *paired_errors(study)


@pytest.fixture(scope="module")
def reached(pilot, make):
    """A scan that needs a second round, and how many checkpoints it scored."""
    study = make(stderr_nats=pilot[1] / 1.2)
    return study, run(study)


def test_a_wide_precision_takes_the_first_round_alone(pilot):
    assert {row["num_instances"] for row in rows_of(pilot[0])} == {64}
    assert read_manifest(pilot[0].output, "scan")["status"] == "finished"


def test_a_narrow_precision_takes_as_many_instances_as_it_needs(reached):
    study, num_scored = reached
    assert {row["num_instances"] for row in rows_of(study)} == {128}
    assert num_scored == 2 * CHECKPOINTS
    assert paired_errors(study)[0] <= study.stderr_nats
    assert run(study) == 0


@pytest.mark.parametrize("interrupt_at", [2, CHECKPOINTS, CHECKPOINTS + 2])
def test_a_scan_that_was_interrupted_in_any_round_comes_to_the_same(make, reached, interrupt_at):
    study, num_in_all = reached
    study = make(stderr_nats=study.stderr_nats)
    run(study, interrupt_at)
    assert read_status(study.output)[0].done == interrupt_at % CHECKPOINTS  # of its round
    assert run(study) == num_in_all - interrupt_at
    assert rows_of(study) == rows_of(reached[0])


def test_a_precision_that_is_out_of_reach_takes_all_instances_and_their_values(make):
    narrow, whole = make(precision=1e-9), make()
    run(narrow)
    run(whole)
    assert rows_of(narrow) == rows_of(whole)
    assert {row["num_instances"] for row in rows_of(whole)} == {N}


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


def test_an_item_that_its_store_kept_from_being_scored_ends_the_scan_and_is_no_failure(make):
    study = make()
    setup, outcome = prepare_scan(study), ScanOutcome(study.output)
    meter = ScanMeter(Display(), outcome, "rounds", setup.works)
    with open_tracker(study.mlflow) as tracker:
        collector = Collector(setup, None, tracker.run(None), meter, outcome)
    item, *_ = plan_items(setup.works, 1, 0)
    (row,) = failed_table(item, "Cannot reach 's3://a': 503.", OUTAGE).to_pylist()
    with pytest.raises(StoreOutageError, match="Cannot reach 's3://a': 503"):
        collector.add(row)
    assert outcome.failures == []
