"""Before Ray: trials and their ledger, resources, and what Optuna is told of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_studies import tiny_pretrain
from tiny_sweep import begin, finish, tiny_sweep

from ke_ray.engine.sweep.resources import trial_resources
from ke_ray.engine.sweep.run import collect_sweep, run_sweep
from ke_ray.engine.sweep.search import LedgerSearcher
from ke_ray.errors import ConfigError, ResultsError, UserError
from ke_ray.planning.sweep import SweepPlan, prepare_sweep
from ke_ray.results.manifest import new_manifest
from ke_ray.results.scan_folder import ScanFolder
from ke_ray.results.sweep_folder import pareto_points, settings_rows, sweep_summary
from ke_ray.tracking.tracker import open_tracker
from ke_ray.training.pretrain import run_pretrain
from ke_ray.training.runs import run_key, write_failed


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    run_pretrain(tiny_pretrain(folder, num_steps=3, checkpoints={"steps": [0]}))
    return folder


def tpe(output: Path, series: Path, **changes: Any) -> Any:
    return tiny_sweep(
        output,
        series,
        **{
            "base": {"starts": {"steps": "3:3"}},
            "points": [],
            "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            "search": "tpe",
            "num_trials": 6,
            "startup_trials": 3,
            "objectives": ["acquisition"],
            **changes,
        },
    )


def searcher(plan: SweepPlan) -> LedgerSearcher:
    return LedgerSearcher(plan, lambda trial: {"name": trial.trial_id}, lambda *_: None)


def test_trials_are_points_times_seeds_with_their_resolved_values(
    tmp_path: Path, series: Path
) -> None:
    study = tiny_sweep(tmp_path, series, base={"starts": {"steps": "3:3"}}, seeds=[0, 7])
    plan = prepare_sweep(study)
    assert [trial.trial_id for trial in plan.trials] == [
        *("0000-no-resuscitation-seed0", "0000-no-resuscitation-seed7"),
        *("0001-factor0.5-seed0", "0001-factor0.5-seed7"),
        *("0002-factor2-seed0", "0002-factor2-seed7"),
    ]
    assert plan.num_trials == 6
    last = plan.trials[-1]
    assert last.study.resuscitation is not None
    assert (last.study.resuscitation.factor, last.study.resuscitation.ratio) == (2, 0.5)
    assert last.study.seeds == (7,)
    assert last.params == {"resuscitation.factor": 2}
    assert plan.trials[0].study.resuscitation is None
    assert plan.trials[0].params["resuscitation.factor"] is None


def test_a_trial_starts_at_one_checkpoint(tmp_path: Path, series: Path) -> None:
    everything = {"starts": {"steps": None}}
    with pytest.raises(ConfigError, match="has 2 starting checkpoints.*checkpoint: last"):
        prepare_sweep(tiny_sweep(tmp_path, series, base=everything))
    last = prepare_sweep(tiny_sweep(tmp_path, series, base=everything, checkpoint="last"))
    assert {trial.spec.ref.step for trial in last.trials} == {3}
    both = {"checkpoint": ["step0", 2], "resuscitation.factor": [1]}
    plan = prepare_sweep(tiny_sweep(tmp_path, series, base=everything, space=both, points=[]))
    assert [trial.spec.ref.step for trial in plan.trials] == [0, 3], "2: the nearest is 3"
    assert [trial.params["checkpoint"] for trial in plan.trials] == ["step0", "step3"]
    wrong = {"checkpoint": ["stpe3"]}
    with pytest.raises(ConfigError, match="Did you mean 'step3'"):
        prepare_sweep(tiny_sweep(tmp_path, series, base=everything, space=wrong, points=[]))


def test_what_is_missing_is_found_before_anything_runs(tmp_path: Path, series: Path) -> None:
    base = {"starts": {"steps": "3:3"}}
    nowhere = {"resuscitation": {"ratio": 0.5, "factor": 1, "coefficients": "nowhere"}}
    with pytest.raises(UserError, match="'nowhere', which is not there"):
        prepare_sweep(tiny_sweep(tmp_path / "out", series, base={**base, **nowhere}))
    too_big = {"space": {"global_batch_size": [8, 4096]}, "points": []}
    with pytest.raises(UserError, match="4096|rows"):
        prepare_sweep(tiny_sweep(tmp_path / "out", series, base=base, **too_big))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_coefficients_of_other_weights_are_refused_before_anything_runs(
    tmp_path: Path, series: Path
) -> None:
    row = {"checkpoint": "step3", "corpus": "x", "measure": "knowledge_entropy", "value": 1.0}
    manifest = new_manifest("scan", {}) | {"identity": {"corpora": {"x": "0" * 64}}}
    scan = ScanFolder(str(tmp_path / "scan"), manifest)
    row |= {"weights_sha256": "0" * 64, "status": "ok"}
    scan.write_part("step3", [row], None, {"x": np.ones((2, 48))})
    scan.consolidate(final=True)
    keys = {"ratio": 0.5, "factor": 1, "coefficients": scan.uri}
    base = {"starts": {"steps": "3:3"}, "resuscitation": keys}
    with pytest.raises(ResultsError, match="no coefficients of these weights.*allow_mismatch"):
        prepare_sweep(tiny_sweep(tmp_path / "out", series, base=base))
    assert not (tmp_path / "out" / "manifest.json").exists()
    base["resuscitation"] = {**keys, "allow_mismatch": True}
    assert len(prepare_sweep(tiny_sweep(tmp_path / "out", series, base=base)).trials) == 3


def test_a_changed_file_is_refused_with_what_changed(tmp_path: Path, series: Path) -> None:
    base = {"starts": {"steps": "3:3"}}
    begin(prepare_sweep(tiny_sweep(tmp_path, series, base=base)))
    prepare_sweep(tiny_sweep(tmp_path, series, base=base, retries=5, max_concurrent=1))
    changed = {**base, "optimizer": {"learning_rate": 0.1}, "epochs": 2}
    with pytest.raises(ResultsError) as told:
        prepare_sweep(tiny_sweep(tmp_path, series, base=changed))
    text = str(told.value)
    assert "base.optimizer.learning_rate was 0.005, is 0.1" in text
    assert "base.epochs was the default, is 2" in text
    assert "another output folder" in text
    with pytest.raises(ResultsError, match=r"space\.resuscitation\.factor"):
        prepare_sweep(
            tiny_sweep(tmp_path, series, base=base, space={"resuscitation.factor": [0.5, 3]})
        )


def test_a_corpus_that_changed_under_its_name_is_refused(tmp_path: Path, series: Path) -> None:
    study = tiny_sweep(tmp_path / "out", series, base={"starts": {"steps": "3:3"}})
    source = Path(study.base.corpus.source)
    moved = tmp_path / source.name
    moved.write_bytes(source.read_bytes())
    keys = {"starts": {"steps": "3:3"}, "corpus": {**study.base.corpus.model_dump()}}
    keys["corpus"]["source"] = str(moved)
    study = tiny_sweep(tmp_path / "out", series, base=keys)
    begin(prepare_sweep(study))
    prepare_sweep(study)
    moved.write_bytes(source.read_bytes() * 2)
    with pytest.raises(ResultsError, match=f"'{moved}' changed after.*new name with --output"):
        prepare_sweep(study)


def test_finished_trials_are_not_handed_out_again_and_failed_ones_are(
    tmp_path: Path, series: Path
) -> None:
    study = tiny_sweep(tmp_path, series, base={"starts": {"steps": "3:3"}})
    plan = prepare_sweep(study)
    begin(plan)
    finish(plan.trials[0], 0.1)
    write_failed(plan.trials[1].study, plan.trials[1].spec, "broken")
    again = searcher(prepare_sweep(study))
    handed = []
    while isinstance(config := again.suggest(f"t{len(handed)}"), dict):
        handed.append(config["name"])
    assert config is None, "a trial that runs may come back"
    assert handed == [plan.trials[1].trial_id, plan.trials[2].trial_id]
    # Other weights at the same place make the row that of another run.
    weights = series / "checkpoints" / "step3" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\0")
        assert not prepare_sweep(study).trials[0].is_done
    finally:
        weights.write_bytes(kept)
    assert prepare_sweep(study).trials[0].is_done


def test_optuna_keeps_its_history_over_a_resume(tmp_path: Path, series: Path) -> None:
    study = tpe(tmp_path, series, seeds=[0, 1], points=[{"optimizer.learning_rate": 2e-3}])
    plan = prepare_sweep(study)
    begin(plan)
    first = searcher(plan)
    for number in range(8):  # four points of two seeds: the given one, and three drawn
        assert isinstance(first.suggest(f"t{number}"), dict)
    assert [p.number for p in plan.points] == [0, 1, 2, 3]
    for point, (a, b) in enumerate([(0.1, 0.3), (0.5, 0.1), (0.2, None)]):
        for trial, value in zip(plan.trials_of(point), (a, b), strict=True):
            if value is None:
                write_failed(trial.study, trial.spec, "broken")
            else:
                finish(trial, value)
        for number in range(8):
            if first.running.get(f"t{number}") in plan.trials_of(point):
                first.on_trial_complete(f"t{number}", {})
    told = {t.params["optimizer.learning_rate"]: t for t in first.optuna_study.trials}
    asked = [point.params["optimizer.learning_rate"] for point in plan.points]
    assert [told[rate].value for rate in asked[:3]] == pytest.approx([0.2, 0.3, 0.2])
    assert told[asked[3]].state.name == "RUNNING"

    resumed_plan = prepare_sweep(study)
    assert [p.params for p in resumed_plan.points] == [p.params for p in plan.points]
    resumed = searcher(resumed_plan)
    known = {t.params["optimizer.learning_rate"]: t for t in resumed.optuna_study.trials}
    assert set(known) == set(asked)
    assert [known[rate].value for rate in asked[:2]] == pytest.approx([0.2, 0.3])
    # The point with a failed repeat is tried again before anything new; then the unfinished one.
    waiting = [trial.trial_id for trial in resumed.waiting]
    assert waiting == [
        plan.trials_of(2)[1].trial_id,
        *(trial.trial_id for trial in plan.trials_of(3)),
    ]
    names = []
    while isinstance(config := resumed.suggest(f"r{len(names)}"), dict):
        names.append(config["name"])
    assert len(names) == 3 + 2 * (7 - 4)
    drawn = [point.params["optimizer.learning_rate"] for point in resumed_plan.points]
    assert len(set(drawn)) == 7, "a resumed sampler must not repeat its first draws"


def test_a_stopped_trial_is_pruned_for_optuna(tmp_path: Path, series: Path) -> None:
    study = tpe(tmp_path, series, scheduler={"name": "asha"})
    plan = prepare_sweep(study)
    begin(plan)
    first = searcher(plan)
    for name in ("a", "b"):
        first.suggest(name)
    finish(plan.trials[0], None, "stopped", stopped_at_step=3, acquisition_at_stop=0.04)
    first.on_trial_complete("a", {})
    for view in (first, searcher(prepare_sweep(study))):
        stopped = view.optuna_study.trials[0]
        assert stopped.state.name == "PRUNED"
        assert stopped.intermediate_values == {3: 0.04}
        assert view.optuna_study.trials[1].state.name == "RUNNING"


def test_tpe_draws_better_points_than_chance(tmp_path: Path, series: Path) -> None:
    study = tpe(tmp_path, series, num_trials=30, startup_trials=8)
    plan = prepare_sweep(study)
    begin(plan)
    source, drawn = searcher(plan), []
    import math

    while isinstance(source.suggest(f"t{len(drawn)}"), dict):
        trial = plan.trials[-1]
        rate = trial.study.optimizer.learning_rate
        drawn.append(abs(math.log10(rate) + 3.5))  # best at 10^-3.5
        finish(trial, -drawn[-1])
        source.on_trial_complete(f"t{len(drawn) - 1}", {})
    assert len(drawn) == 30
    # Uniform in the logarithm the mean distance over [-4, -2] is 0.625.
    assert sum(drawn[15:]) / 15 < 0.35


ONE = [{"CPU": 2.0}]


@pytest.mark.parametrize(
    ("changes", "workers", "nodes", "trials", "expected"),
    [
        ({}, 1, ONE, 4, (2, 1, 0)),
        ({}, 1, ONE, 1, (1, 2, 0)),
        ({"max_concurrent": 1}, 1, ONE, 4, (1, 2, 0)),
        ({"cpus_per_trial": 2}, 1, ONE, 4, (1, 2, 0)),
        ({}, 1, [{"CPU": 64.0}], 4, (4, 16, 0)),
        ({}, 1, [{"CPU": 4.0}] * 3, 2, (2, 4, 0)),
        ({"cpus_per_trial": 3}, 1, [{"CPU": 4.0}] * 3, 9, (3, 3, 0)),
        ({}, 1, [{"CPU": 16.0, "GPU": 2.0}], 9, (2, 8, 1)),
        ({"gpus_per_trial": 0.5}, 1, [{"CPU": 16.0, "GPU": 2.0}], 9, (4, 4, 0.5)),
        ({"gpus_per_trial": 0}, 1, [{"CPU": 16.0, "GPU": 2.0}], 9, (9, 1, 0)),
        ({}, 2, ONE, 4, (1, 1, 0)),
        ({}, 2, [{"CPU": 8.0}], 4, (4, 1, 0)),
        ({}, 2, [{"CPU": 8.0}], 1, (1, 4, 0)),
        ({"cpus_per_trial": 4}, 2, [{"CPU": 9.0}], 4, (2, 2, 0)),
        ({}, 4, [{"CPU": 16.0, "GPU": 4.0}] * 2, 9, (2, 4, 1)),
    ],
)
def test_concurrency_follows_the_cluster(
    tmp_path: Path,
    series: Path,
    changes: dict[str, Any],
    workers: int,
    nodes: list[dict[str, float]],
    trials: int,
    expected: tuple[int, int, float],
) -> None:
    study = tiny_sweep(tmp_path, series, base={"num_workers": workers}, **changes)
    found = trial_resources(study, nodes, trials)
    assert (found.concurrency, found.cpus, found.gpus) == expected
    busy = found.concurrency * found.cpus * workers
    assert busy <= sum(node["CPU"] for node in nodes)


@pytest.mark.parametrize(
    ("changes", "base", "nodes", "expected"),
    [
        ({"cpus_per_trial": 3}, {}, ONE, "requests 3 CPUs"),
        ({"cpus_per_trial": 3}, {}, [{"CPU": 2.0}] * 4, "more than the cluster's nodes have"),
        ({"gpus_per_trial": 1}, {}, ONE, "1 CPU and 1 GPU"),
        ({}, {"use_gpu": True}, ONE, "1 GPU"),
        ({}, {"num_workers": 4}, ONE, "4 workers of 1 CPU"),
        ({}, {"num_workers": 4}, [{"CPU": 16.0, "GPU": 2.0}], "4 workers of 1 CPU and 1 GPU"),
        ({"cpus_per_trial": 1}, {"num_workers": 2}, ONE, "fewer than the 2 workers"),
        ({"gpus_per_trial": 0.5}, {"num_workers": 2}, [{"CPU": 8.0, "GPU": 8.0}], "0 or 2"),
    ],
)
def test_a_trial_that_can_never_run_is_refused(
    tmp_path: Path,
    series: Path,
    changes: dict[str, Any],
    base: dict[str, Any],
    nodes: list[dict[str, float]],
    expected: str,
) -> None:
    study = tiny_sweep(tmp_path, series, base=base, **changes)
    with pytest.raises(ConfigError, match=expected):
        trial_resources(study, nodes, 4)


def test_tables_and_summary_of_a_sweep(tmp_path: Path, series: Path) -> None:
    from ke_ray.outcomes import SweepOutcome

    study = tiny_sweep(tmp_path, series, base={"starts": {"steps": "3:3"}}, seeds=[0, 1])
    plan = prepare_sweep(study)
    begin(plan)
    values = iter([(0.1, 0.2), (0.3, 0.4), (0.5, 0.1), (0.7, 0.1), (0.9, 0.3)])
    for trial, (a, f) in zip(plan.trials, values, strict=False):
        finish(trial, a, forgetting=f, mlflow_run_id="x", num_steps=6)
    write_failed(plan.trials[5].study, plan.trials[5].spec, "out of memory")
    outcome = SweepOutcome(study.output)
    collect_sweep(plan, outcome)
    assert outcome.exit_code == 1
    assert outcome.failures == [(plan.trials[5].trial_id, "out of memory")]
    summary = sweep_summary(str(tmp_path))
    assert [entry["status"] for entry in summary] == ["ok"] * 5 + ["failed"]
    assert summary[0]["parameters"]["resuscitation.factor"] is None
    assert summary[2]["parameters"]["resuscitation.factor"] == 0.5
    assert (summary[3]["acquisition"], summary[3]["forgetting"]) == (0.7, 0.1)
    assert (summary[5]["acquisition"], summary[5]["error"]) == (None, "out of memory")
    objectives = [("acquisition", "maximize"), ("forgetting", "minimize")]
    settings = {(s["point"], s["metric"]): s for s in settings_rows(outcome.rows, objectives)}
    half = settings[1, "acquisition"]
    assert half["value"] == pytest.approx(0.6)
    # Student's t with one degree of freedom, 12.7062, times 0.1 (= sd/sqrt(2)).
    assert half["high"] - half["value"] == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert (settings[2, "forgetting"]["num_ok"], settings[2, "forgetting"]["num_failed"]) == (1, 1)
    assert [settings[p, "forgetting"]["on_front"] for p in (0, 1, 2)] == [False, True, True]


def test_a_folder_that_is_made_anew_is_another_run(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sweeps of one relative folder share a store; a resumed one goes on with its run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "as users know it")
    found = []
    for place in ("one", "one", "two"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        study = tiny_sweep(Path("out"), series, base={"starts": {"steps": "3:3"}}, mlflow={})
        plan = prepare_sweep(study)
        begin(plan)
        for trial in plan.trials:
            finish(trial, 0.1, forgetting=0.2)
        for _ in range(2):
            with open_tracker(study.mlflow) as tracker:
                assert tracker.experiment == "as users know it"
                found.append(run_sweep(prepare_sweep(study), tracker).mlflow_run_id)
    assert found[0::2] == found[1::2]
    keys = {run_key(plan.trials[0].study, plan.trials[0].spec, parent) for parent in found}
    assert len(keys) == len(set(found)) == 3


def test_an_objective_that_no_trial_reported_is_said(tmp_path: Path, series: Path) -> None:
    from ke_ray.outcomes import SweepOutcome

    plan = prepare_sweep(tiny_sweep(tmp_path, series, base={"starts": {"steps": "3:3"}}))
    begin(plan)
    for trial in plan.trials:  # as where every probability was 0 before: F is no number
        finish(trial, 0.1, forgetting=None)
    outcome = SweepOutcome(str(tmp_path))
    collect_sweep(plan, outcome)
    assert (outcome.missing, outcome.exit_code) == (["forgetting"], 1)
    assert outcome.failures == []


def test_the_front_against_a_loop() -> None:
    points = {0: (1.0, 5.0), 1: (2.0, 5.0), 2: (0.5, 1.0), 3: (2.0, 6.0), 4: (None, 0.0)}
    rows = [
        {"point": p, "metric": m, "direction": d, "value": v}
        for p, pair in points.items()
        for m, d, v in zip(("a", "f"), ("maximize", "minimize"), pair, strict=True)
    ]
    front = set()
    for p, (a, f) in points.items():
        others = [q for n, q in points.items() if n != p and q[0] is not None]
        beaten = a is None or any(
            q[0] >= a and q[1] <= f and (q[0] > a or q[1] < f) for q in others
        )
        if not beaten:
            front.add(p)
    assert pareto_points(rows) == front == {1, 2}
