"""The scan on real Ray: same numbers however it is cut, nothing lost, nothing done twice."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_scans import make_study

from ke_ray.core.measures import MEASURES
from ke_ray.engine.scan.run import run_scan
from ke_ray.outcomes import Display
from ke_ray.planning import scan_items as plan
from ke_ray.planning.scan import prepare_scan
from ke_ray.results import ScanFolder, read_manifest
from ke_ray.results.status import read_status
from ke_ray.studies.parts import TrackingSettings
from ke_ray.tracking.tracker import open_tracker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


class Recorder(Display):
    """Remembers what a scan showed."""

    def __init__(self):
        self.done, self.failed, self.skipped, self.on_checkpoint = [], [], 0, None

    def start(self, *, num_items, num_skipped, note=""):
        self.skipped = num_skipped

    def ended(self, name, rows):
        ok = all(row["status"] == "ok" for row in rows)
        (self.done if ok else self.failed).append(name)
        if self.on_checkpoint:
            self.on_checkpoint(name)


def scan(study, recorder=None):
    recorder = recorder or Recorder()
    with open_tracker(study.mlflow) as tracker:
        outcome = run_scan(prepare_scan(study), recorder, tracker)
    return outcome, recorder


def values_of(output):
    return {
        (r["checkpoint"], r["corpus"], r["layer"], r["measure"]): (
            r["value"],
            np.nan if r["stderr"] is None else r["stderr"],
        )
        for r in ScanFolder.open(str(output)).entropy().to_pylist()
        if r["status"] == "ok"
    }


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        np.testing.assert_allclose(
            found[key], pair, rtol=tolerance, atol=tolerance, err_msg=str(key)
        )


@pytest.fixture(scope="module")
def expected(series, token_ids):
    """Every measure of every checkpoint by one call without Ray."""
    import torch

    from ke_ray.core.measures import evaluate
    from ke_ray.models.loading import load_model
    from ke_ray.models.scoring import score_instances

    ids = np.load(token_ids).astype(np.int32)
    values = {}
    for folder in sorted(series.iterdir()):
        model = load_model(folder, dtype=torch.float32)
        sums = score_instances(
            model, ids, None, measures=tuple(MEASURES), num_instances=70, batch_size=70
        )
        for row in evaluate(sums, tuple(MEASURES)).rows:
            values[folder.name, "ids", row.layer, row.measure] = (row.value, row.stderr)
    return values


@pytest.fixture(scope="module")
def whole(ray_cluster, series, token_ids, tmp_path_factory):
    """A tracked scan of everything on one actor, and the tokens that it showed on its way."""
    folder = tmp_path_factory.mktemp("whole")
    seen = []

    class Counter(Recorder):
        def tokens(self, num_tokens, total, note=""):
            assert total == 4 * 70 * 24
            seen.append(num_tokens)

    study = make_study(
        series,
        token_ids,
        folder / "scan",
        measures=tuple(MEASURES),
        batch_size=10,
        mlflow=TrackingSettings(uri=f"sqlite:///{folder}/mlflow.db", experiment="scans"),
    )
    threads_before = threading.active_count()
    outcome, _ = scan(study, Counter())
    time.sleep(0.1)
    assert threading.active_count() <= threads_before + 2
    assert outcome.exit_code == 0
    return study, outcome, seen


def test_one_actor_gives_the_values_of_one_call(whole, expected):
    assert_same(values_of(whole[0].output), expected)


@pytest.mark.parametrize(("batch_size", "least_cut"), [(3, 65536), (7, 1)])
def test_actors_batches_and_cuts_change_nothing(
    scan_study, series, expected, monkeypatch, batch_size, least_cut
):
    monkeypatch.setattr(plan, "MIN_TOKENS_OF_A_CUT", least_cut)
    monkeypatch.setitem(plan.BYTES_PER_S, "here", 1e15)  # loading costs nothing
    study = scan_study(
        num_actors=2,
        batch_size=batch_size,
        measures=tuple(MEASURES),
        # An odd number, so that the last checkpoint is cut where cutting is allowed.
        checkpoints={"spec": str(series), "steps": "10:30"},
    )
    setup = prepare_scan(study)
    if least_cut == 1:
        assert len(plan.plan_items(setup.works, 2, 0.0)) == 4
    outcome, _ = scan(study)
    assert outcome.exit_code == 0
    assert_same(values_of(study.output), {k: v for k, v in expected.items() if k[0] != "step40"})


def test_result_columns_hold_what_they_say(whole, expected):
    study, _, _ = whole
    folder = ScanFolder.open(study.output)
    rows = folder.entropy().to_pylist()
    assert len(rows) == len(expected)
    assert sum(r["measure"] in ("knowledge_entropy", "gini") for r in rows) == 4 * 2 * 3
    first = rows[0]
    assert (first["checkpoint"], first["step"], first["num_instances"]) == ("step10", 10, 70)
    assert first["num_tokens"] == 70 * 24
    label = "olmo, 2 layers, d_model 32, d_mlp 48"
    assert {(r["series"], r["n_layers"], r["d_mlp"], r["stage"]) for r in rows} == {
        (label, 2, 48, None)
    }
    assert len(first["weights_sha256"]) == len(first["data_sha256"]) == 64
    units = {r["measure"]: r["unit"] for r in rows}
    assert (units["knowledge_entropy"], units["gini"]) == ("nats", "fraction")
    replicates = folder.replicates().to_pylist()
    for measure in ("knowledge_entropy", "gini"):
        assert sum(row["measure"] == measure for row in replicates) == 4 * 3 * 64
    coefficients = folder.mean_coefficients("step20")
    assert coefficients.shape == (2, 48)
    shares = coefficients / coefficients.sum(1, keepdims=True)
    total = next(
        r["value"]
        for r in rows
        if (r["checkpoint"], r["measure"], r["layer"]) == ("step20", "knowledge_entropy", None)
    )
    assert total == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-5)
    manifest = read_manifest(study.output)
    assert manifest["status"] == "finished"
    assert [c["step"] for c in manifest["checkpoints"]] == [10, 20, 30, 40]


def test_finished_work_is_never_done_again_and_wider_requests_add(scan_study, series, token_ids):
    narrow = scan_study(
        measures=("knowledge_entropy",), checkpoints={"spec": str(series), "steps": "10:20"}
    )
    scan(narrow)
    before = values_of(narrow.output)
    _, again = scan(narrow)
    assert (again.done, again.skipped) == ([], 2)
    _, wider = scan(scan_study(measures=("knowledge_entropy",)))
    assert (sorted(wider.done), wider.skipped) == (["step30", "step40"], 2)
    more = prepare_scan(scan_study(measures=("knowledge_entropy", "top_k_mass")))
    assert (len(more.works), more.num_skipped) == (4, 0)
    other = token_ids.with_name("other.npy")
    np.save(other, np.load(token_ids)[::-1])
    both = {"ids": str(token_ids), "other": str(other)}
    _, all_of_it = scan(scan_study(measures=("knowledge_entropy", "top_k_mass"), data=both))
    assert (len(all_of_it.done), all_of_it.skipped) == (4, 0)
    found = values_of(narrow.output)
    assert {key: found[key] for key in before} == before
    assert len(found) == 4 * 2 * 2 * 3


def break_checkpoint(folder: Path, how: str) -> None:
    import safetensors.torch as st

    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return
    tensors = st.load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "shapes":
        tensors[name] = tensors[name][:-1].contiguous()
    elif how == "nan":
        tensors[name][0, 0] = float("nan")
    elif how == "missing":
        del tensors[name]
    st.save_file(tensors, weights, metadata={"format": "pt"})


def test_broken_checkpoints_become_rows_and_the_others_finish(scan_study, series, tmp_path):
    folder = tmp_path / "series"
    shutil.copytree(series, folder)
    broken = {"step15": "truncated", "step25": "shapes", "step35": "nan", "step45": "missing"}
    for name, how in broken.items():
        shutil.copytree(series / "step10", folder / name)
        break_checkpoint(folder / name, how)
    study = scan_study(checkpoints={"spec": str(folder)}, measures=("knowledge_entropy",))
    outcome, recorder = scan(study)
    assert outcome.exit_code == 1
    assert sorted(recorder.done) == ["step10", "step20", "step30", "step40"]
    assert sorted(name for name, _ in outcome.failures) == sorted(broken)
    rows = ScanFolder.open(study.output).entropy().to_pylist()
    errors = {r["checkpoint"]: r["error"] for r in rows if r["status"] == "failed"}
    assert sorted(errors) == sorted(broken)
    assert all(error and "\n" not in error for error in errors.values())
    assert "truncated" in errors["step15"]
    assert "NaN" in errors["step35"]
    assert read_manifest(study.output)["status"] == "failed"

    # Mended, the same request does these four and ends well.
    for name in broken:
        shutil.rmtree(folder / name)
        shutil.copytree(series / "step20", folder / name)
    outcome, recorder = scan(study)
    assert (outcome.exit_code, sorted(recorder.done), recorder.skipped) == (0, sorted(broken), 4)
    rows = ScanFolder.open(study.output).entropy().to_pylist()
    assert {r["status"] for r in rows} == {"ok"}
    duplicates = {r["checkpoint"]: r["duplicate_of"] for r in rows}
    assert duplicates["step25"] == "step15"
    assert duplicates["step20"] == "step15"
    assert duplicates["step10"] is None


def test_other_weights_under_one_name_are_scored_from_scratch(
    scan_study, series, expected, tmp_path
):
    folder = tmp_path / "series"
    for name in ("step10", "step20"):
        shutil.copytree(series / name, folder / name)
    spec = {"spec": str(folder)}
    both, one = ("knowledge_entropy", "gini"), ("knowledge_entropy",)
    scan(scan_study(checkpoints=spec, measures=both))
    shutil.rmtree(folder / "step10")
    shutil.copytree(series / "step30", folder / "step10")
    study = scan_study(checkpoints=spec, measures=one)
    # Killed right after it began: what it has written by then must not make old values current.
    setup = prepare_scan(study)
    assert setup.changed == ["step10"]
    setup.folder.consolidate(without=setup.changed)
    assert {key[0] for key in values_of(study.output)} == {"step20"}
    _, again = scan(study)
    assert (again.done, again.skipped) == (["step10"], 1)
    scan(scan_study(checkpoints=spec, measures=both))
    names = {"step10": "step30", "step20": "step20"}
    wanted = {
        (name, *key[1:]): value
        for name, source in names.items()
        for key, value in expected.items()
        if key[0] == source and key[3] in both
    }
    assert_same(values_of(study.output), wanted)

    # Weights that are gone cannot be compared: what was measured stands.
    (folder / "step20" / "model.safetensors").unlink()
    outcome, _ = scan(scan_study(checkpoints=spec, measures=(*both, "top_k_mass")))
    assert [name for name, _ in outcome.failures] == ["step20"]
    assert values_of(study.output).keys() > wanted.keys()


def test_an_item_that_keeps_killing_its_actor_is_given_up(scan_study, series, token_ids):
    """A ticket that Ray Data repeats, since its actor was lost before the item was scored."""
    import pyarrow as pa
    import ray
    import torch

    from ke_ray.core.precision import matmul_precision
    from ke_ray.engine.scan.scorer import MAX_ATTEMPTS, CheckpointScorer
    from ke_ray.planning.scan_dealing import Dealer
    from ke_ray.planning.scan_messages import ScorerSettings
    from ke_ray.planning.scan_monitor import ScanMonitor

    setup = prepare_scan(scan_study(measures=("knowledge_entropy",)))
    monitor = ray.remote(num_cpus=0)(ScanMonitor).remote(Dealer(setup.works, 1, 0.0))
    corpus = setup.corpora["ids"]
    settings = ScorerSettings("float32", 8, 0.01, 0.1, "auto", None, None, None)
    arrays = {"ids": ray.put((corpus.input_ids, corpus.lengths))}
    with matmul_precision("highest"):  # a scorer has its process for itself
        CheckpointScorer(replace(settings, matmul_precision="high"), setup.refs, arrays, monitor)
        assert torch.get_float32_matmul_precision() == "high"
    scorer = CheckpointScorer(settings, setup.refs, arrays, monitor)
    for attempt in range(MAX_ATTEMPTS):
        deal, _ = ray.get(monitor.take.remote(0, f"lost {attempt}"))
        assert (setup.refs[deal.item.checkpoint].name, deal.losses) == ("step10", attempt)
        ray.get(monitor.begin.remote(deal.item.index))
    (row,) = scorer(pa.table({"ticket": [0]})).to_pylist()
    assert (row["checkpoint"], row["status"]) == (deal.item.checkpoint, "failed")
    assert "3 times" in row["error"]
    rows = [scorer(pa.table({"ticket": [number]})).to_pylist() for number in range(1, 5)]
    assert [[row["status"] for row in each] for each in rows] == [["ok"], ["ok"], ["ok"], []]


def test_an_interrupt_keeps_what_is_finished(scan_study, series, expected):
    study = scan_study(measures=("knowledge_entropy",), num_actors=1)
    recorder = Recorder()

    def interrupt(name):
        recorder.on_checkpoint = None
        signal.raise_signal(signal.SIGINT)

    recorder.on_checkpoint = interrupt
    with pytest.raises(KeyboardInterrupt):
        scan(study, recorder)
    assert read_manifest(study.output)["status"] == "interrupted"
    finished = {key[0] for key in values_of(study.output)}
    assert finished
    (told,) = read_status(study.output)
    assert (told.state, told.done, told.left) == ("stopped", len(finished), 4 - len(finished))
    _, again = scan(study)
    assert again.skipped == len(finished)
    assert set(again.done) == {"step10", "step20", "step30", "step40"} - finished
    assert_same(
        values_of(study.output),
        {key: value for key, value in expected.items() if key[3] == "knowledge_entropy"},
    )


def test_a_scorer_ends_with_its_scan_though_it_restarts_meanwhile_and_is_held(scan_study):
    """Ray has lost the end of such an actor; here a handle that is kept stands for that."""
    from ray.actor import ActorHandle

    recorder, kept, killed = Recorder(), [], []

    def keep_and_kill(name):
        if not kept:
            handles = [o for o in gc.get_objects() if isinstance(o, ActorHandle)]
            kept.extend(handle for handle in handles if "CheckpointScorer" in repr(handle))
        if len(recorder.done) == 4:
            for process in scorer_processes():
                process.kill()
                killed.append(process.pid)

    recorder.on_checkpoint = keep_and_kill
    outcome, _ = scan(scan_study(measures=("knowledge_entropy",)), recorder)
    assert outcome.exit_code == 0
    assert killed
    deadline = time.monotonic() + 180
    while is_alive(kept[0]) or scorer_processes():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_alive(actor):
    """Whether an actor of Ray Data's answers; one that restarts is waited for."""
    import ray

    try:
        return bool(ray.get(actor.get_location.remote(), timeout=120))
    except ray.exceptions.ActorDiedError:
        return False


def scorer_processes():
    """Of this session."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "CheckpointScorer" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_mlflow_has_a_point_for_each_checkpoint(whole):
    from mlflow.tracking import MlflowClient

    study, outcome, _ = whole
    client = MlflowClient(study.mlflow.uri)
    run = client.get_run(outcome.mlflow_run_id)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(outcome.mlflow_run_id, "knowledge_entropy/total_nats")
    values = values_of(study.output)
    assert {(point.step, point.value) for point in history} == {
        (step, values[f"step{step}", "ids", None, "knowledge_entropy"][0])
        for step in (10, 20, 30, 40)
    }
    assert run.data.params["num_instances"] == "70"
    corpus_sha256 = prepare_scan(study).corpora["ids"].sha256
    assert run.data.tags["data_sha256.ids"] == corpus_sha256
    assert len(run.data.tags["weights_sha256.step10"]) == 64
    assert run.inputs.dataset_inputs[0].dataset.name == "ids"


def test_progress_counts_tokens_while_it_runs(whole):
    _, _, seen = whole
    assert seen == sorted(seen)
    assert seen[-1] == 4 * 70 * 24
