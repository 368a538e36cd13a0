"""Continual learning without Ray: one run, its numbers, its inputs, its resumption."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_studies import tiny_continual, tiny_pretrain
from tiny_training import start_process

from ke_ray.config import validate
from ke_ray.core.acquisition import acquisition, forgetting
from ke_ray.data.probes import build_probes
from ke_ray.errors import CheckpointSpecError, ConfigError, DataError, UserError
from ke_ray.evaluation.probes import score_probes
from ke_ray.models.loading import load_model
from ke_ray.storage import read_table
from ke_ray.studies.continual import ALL_TASKS, ContinualStudy
from ke_ray.training.continual import run_continual
from ke_ray.training.inputs import load_inputs, probe_steps, read_start
from ke_ray.training.loop import Progress
from ke_ray.training.pretrain import run_pretrain
from ke_ray.training.runs import list_runs, part_folder, read_row
from ke_ray.training.snapshot import take_snapshot


def part(study: ContinualStudy, index: int = -1) -> Path:
    return Path(part_folder(study, list_runs(study)[index]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, series: Path) -> ContinualStudy:
    """The last checkpoint's run, finished."""
    entropy = {"measures": ["loss", "gini"]}
    study = tiny_continual(tmp_path_factory.mktemp("continual"), series, entropy=entropy)
    run_continual(study, list_runs(study)[-1])
    return study


def test_the_row_follows_from_the_start_and_the_final_model(
    finished: ContinualStudy, series: Path
) -> None:
    spec = list_runs(finished)[-1]
    row = read_row(finished, spec)
    assert row is not None
    assert row["status"] == "ok"
    assert (row["checkpoint"], row["step"], row["seed"]) == ("step10", 10, 0)
    assert row["num_steps"] == 6
    assert row["num_tokens"] == 6 * 8 * 256
    start = read_start(finished, spec.ref, spec.ref.location)
    inputs = load_inputs(finished, start, 0)
    before = take_snapshot(load_model(spec.ref.location), finished, inputs.questions)
    after = take_snapshot(load_model(row["final_checkpoint"]), finished, inputs.questions)
    assert row["probe_logprob_before"] == pytest.approx(before.knowledge, abs=1e-6)
    assert row["probe_logprob_after"] == pytest.approx(after.knowledge, abs=1e-6)
    assert before.knowledge is not None
    assert after.knowledge is not None
    assert row["acquisition"] == pytest.approx(acquisition(before.knowledge, after.knowledge))
    assert row["acquisition_low"] <= row["acquisition"] <= row["acquisition_high"]
    assert before.accuracy is not None
    assert after.accuracy is not None
    expected = forgetting(before.accuracy, after.accuracy)
    assert row["forgetting"] == (pytest.approx(expected) if math.isfinite(expected) else None)
    assert row["knowledge_entropy_after_nats"] == pytest.approx(after.entropy_nats, abs=1e-6)
    assert row["knowledge_entropy_before_nats"] != row["knowledge_entropy_after_nats"]
    assert row["perplexity_after"] > 1
    assert row["acquisition"] > 0  # six steps on text like the facts'


def test_measures_of_the_trained_model_are_in_row_and_table(finished: ContinualStudy) -> None:
    row = read_row(finished, list_runs(finished)[-1])
    assert row is not None
    table = read_table(part(finished) / "measures.parquet").to_pandas()
    assert set(table["when"]) == {"before", "after"}
    totals = table[table["layer"].isna()].set_index(["when", "measure"])
    measured = json.loads(row["measured"])
    assert measured == {
        "loss": totals.value["after", "loss"],
        "gini": totals.value["after", "gini"],
    }
    assert measured["loss"] != totals.value["before", "loss"]
    assert (totals["stderr"] > 0).all()
    assert (table["measure"] == "gini").sum() == 2 * (2 + 1), "two layers and the total"


def test_a_measure_of_ones_own_travels_with_the_study_as_text(series: Path, tmp_path: Path) -> None:
    from ke_ray.core.measures import unregister
    from ke_ray.studies.identity import identity_keys

    mine = tmp_path / "mine.py"
    example = Path(__file__).parents[2] / "docs" / "examples" / "spread.py"
    mine.write_text(example.read_text())
    entropy = {"own_measures": [f"{mine}:spread"], "measures": ["sensitivity_all_0.1"]}
    study = tiny_continual(tmp_path / "out", series, entropy=entropy)
    mine.unlink()
    again = ContinualStudy.model_validate(study.model_dump(mode="json", exclude_unset=True))
    assert again.entropy == study.entropy
    for name in ("spread", "sensitivity_all_0.1"):
        unregister(name)  # as in a process that a study was sent to
    spec = list_runs(study)[-1]
    inputs = load_inputs(study, read_start(study, spec.ref, spec.ref.location), 0)
    totals = take_snapshot(load_model(spec.ref.location), study, inputs.questions).totals
    assert set(totals) == {"spread", "sensitivity_all_0.1"}
    mine.write_text(example.read_text().replace("clamp_min(0)", "clamp_min(1)"))
    changed = tiny_continual(tmp_path / "out", series, entropy=entropy)
    assert identity_keys(changed) != identity_keys(study)


def test_the_tables_hold_every_probe_injection_and_step(finished: ContinualStudy) -> None:
    folder = part(finished)
    assert sorted(p.name for p in folder.glob("*.parquet")) == [
        "downstream.parquet",
        "dynamics.parquet",
        "injections.parquet",
        "measures.parquet",
        "perplexity.parquet",
        "probe_items.parquet",
        "probes.parquet",
        "retainability.parquet",
        "train.parquet",
    ]
    tables = {p.stem: read_table(p).to_pandas() for p in folder.glob("*.parquet")}
    assert all((table["run"] == "step10-seed0").all() for table in tables.values() if len(table))
    # Every two steps, just before and just after injections at 3 and 6, and both ends.
    assert sorted(set(tables["probes"]["step"])) == [0, 2, 3, 4, 5, 6]
    assert sorted(set(tables["injections"]["step"])) == [3, 6]
    assert (tables["injections"].groupby("step").size() == [4, 3]).all() or (
        len(tables["injections"]) == 2 * 3 + 1
    )
    items = tables["probe_items"]
    assert (items.groupby("step").size() == 4 * 15).all()
    items = items.assign(per_token=items["logprob_summed"] / items["num_target_tokens"])
    ours = items.groupby(["step", "setting", "level"])["per_token"].mean()
    theirs = tables["probes"].set_index(["step", "setting", "level"])["logprob_per_token"]
    np.testing.assert_allclose(ours.sort_index(), theirs.sort_index())
    assert list(tables["train"]["step"]) == [1, 2, 3, 4, 5, 6]
    assert set(tables["downstream"]["when"]) == {"before", "after"}
    dynamics = tables["dynamics"].query("level == 'all' and setting == 'paraphrase'")
    assert list(dynamics["step"]) == [3, 6]
    assert list(dynamics["baseline_step"].iloc[:1]) == [2]
    assert math.isnan(dynamics["effectivity"].iloc[1])  # nothing follows the last step
    assert not (folder / "state").exists()


def test_what_is_injected_is_in_the_batch(finished: ContinualStudy) -> None:
    spec = list_runs(finished)[-1]
    inputs = load_inputs(finished, read_start(finished, spec.ref, spec.ref.location), 0)
    assert inputs.plan is not None
    rows = np.full((8, 256), 7)
    changed = inputs.plan.inject(rows, 3)
    text = json.loads(Path(finished.injection.paraphrase).read_text())[0]["train_context"]  # type: ignore[union-attr, arg-type]
    ids = inputs.start.tokenizer.encode(text).ids
    assert changed[0, : len(ids)].tolist() == ids[:256]
    assert (changed[7] == 7).all()
    assert (inputs.plan.inject(rows, 4) == rows).all()


def _die_at(output: str, series: str, step: int) -> None:
    torch.set_num_threads(1)
    study = tiny_continual(Path(output), Path(series), save_every=2)

    def die(progress: Progress, **_: object) -> None:
        if progress.record.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_continual(study, list_runs(study)[-1], on_progress=die)


def test_a_killed_run_goes_on_and_ends_alike(tmp_path: Path, series: Path) -> None:
    process = start_process(_die_at, str(tmp_path / "a"), str(series), 5)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    study = tiny_continual(tmp_path / "a", series, save_every=2)
    assert (part(study) / "before.json").is_file()
    assert (part(study) / "state" / "step00000004").is_dir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shown: list[int] = []
    try:
        row = run_continual(
            study, list_runs(study)[-1], on_progress=lambda p, **_: shown.append(p.record.step)
        )
        alone = tiny_continual(tmp_path / "b", series)
        other = run_continual(alone, list_runs(alone)[-1])
    finally:
        torch.set_num_threads(threads)
    assert shown == [5, 6]
    weights = [Path(r["final_checkpoint"], "model.safetensors").read_bytes() for r in (row, other)]
    assert weights[0] == weights[1]
    assert row["acquisition"] == other["acquisition"]
    for name in ("probes", "probe_items", "dynamics"):
        ours, theirs = (read_table(part(s) / f"{name}.parquet") for s in (study, alone))
        assert ours.equals(theirs), name


@pytest.mark.parametrize("control", [None, "random", "attention_temperature"])
def test_a_resuscitated_start_is_compared_with_both_starts(
    tmp_path: Path, series: Path, control: str | None
) -> None:
    study = tiny_continual(
        tmp_path,
        series,
        resuscitation={"ratio": 0.5, "factor": 2.0, "control": control},
        downstream=None,
        held_out=None,
        keep_final=False,
    )
    row = run_continual(study, list_runs(study)[-1])
    assert row["resuscitation_ratio"] == 0.5
    assert row["probe_logprob_original"] != row["probe_logprob_before"]
    expected = acquisition(row["probe_logprob_original"], row["probe_logprob_after"])
    assert row["acquisition_vs_original"] == pytest.approx(expected)
    assert row["final_checkpoint"] is None
    if control is None:
        # The memories that were raised make the entropy higher, about as predicted.
        before, predicted = (
            row[f"knowledge_entropy_{when}_nats"] for when in ("before", "predicted")
        )
        original = row["knowledge_entropy_original_nats"]
        assert abs(before - predicted) < abs(before - original)
    if control == "attention_temperature":
        assert row["knowledge_entropy_predicted_nats"] is None


def test_without_facts_a_run_still_trains_and_forgets(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(tmp_path, series, injection=None, entropy=None, epochs=2)
    row = run_continual(study, list_runs(study)[0])
    assert row["num_steps"] == 12
    assert row["acquisition"] is None
    assert row["downstream_after"] is not None
    assert row["knowledge_entropy_before_nats"] is None


def test_seeds_and_starts_span_the_runs(tmp_path: Path, series: Path) -> None:
    study = tiny_continual(tmp_path, series, seeds=(0, 3))
    names = [spec.name for spec in list_runs(study)]
    assert names == ["step5-seed0", "step5-seed3", "step10-seed0", "step10-seed3"]
    spread = tiny_continual(
        tmp_path, series, starts={"spec": str(series / "checkpoints"), "steps": None, "spread": 3}
    )
    assert [spec.ref.step for spec in list_runs(spread)] in ([0, 2, 10], [0, 5, 10])
    near = tiny_continual(tmp_path, series, starts={"steps": None, "nearest": (1, 4, 99)})
    assert [spec.ref.step for spec in list_runs(near)] in ([0, 5, 10], [2, 5, 10])
    staged = tmp_path / "staged"
    for step, name in ((5, "stage1-step5"), (10, "stage1-step10"), (2, "stage2-step6")):
        shutil.copytree(series / "checkpoints" / f"step{step}", staged / name)
    first = {"spec": str(staged), "steps": None, "nearest": (6,)}
    near = tiny_continual(tmp_path, series, starts=first)
    assert [spec.ref.name for spec in list_runs(near)] == ["stage1-step5"]
    last = tiny_continual(tmp_path, series, starts={"spread": 1})
    assert [spec.ref.step for spec in list_runs(last)] == [10]


def test_bad_input_is_one_clear_message_before_training(tmp_path: Path, series: Path) -> None:
    def inputs(start_folder: Path | None = None, **changes: object) -> None:
        study = tiny_continual(tmp_path, series, **changes)
        spec = list_runs(study)[0]
        folder = str(start_folder or spec.ref.location)
        load_inputs(study, read_start(study, spec.ref, folder), 0)

    bare = tmp_path / "bare" / "step10"
    shutil.copytree(series / "checkpoints" / "step10", bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointSpecError, match=r"has no tokenizer\.json; name its tokenizer"):
        inputs(bare)
    inputs(bare, tokenizer=str(series / "tokenizer"))
    with pytest.raises(CheckpointSpecError, match="exceeds the 320 positions"):
        inputs(sequence_length=512)
    with pytest.raises(DataError, match="5000 instances .* were requested"):
        inputs(corpus={"num_instances": 5000})
    with pytest.raises(DataError, match="has 64 rows, but .* gives 48"):
        inputs(global_batch_size=64)
    with pytest.raises(DataError, match="falls on step 20"):
        inputs(injection={"every": 10})
    with pytest.raises(DataError, match=r"steps \[9\] lie outside"):
        inputs(probes={"steps": [9]})
    with pytest.raises(DataError, match="limit_once is 7"):
        inputs(injection={"limit_once": 7})
    with pytest.raises(DataError, match="injected tokens into row"):
        inputs(sequence_length=32)
    schedule = tmp_path / "schedule.json"
    row = {"step": 2, "row": 8, "setting": "once", "instance": 0, "version": 0}
    schedule.write_text(json.dumps([row]))
    with pytest.raises(DataError, match="row 8"):
        inputs(injection={"schedule": str(schedule), "count": None})
    with pytest.raises(UserError, match="no-such-folder"):
        list_runs(
            tiny_continual(tmp_path, series, starts={"spec": str(tmp_path / "no-such-folder")})
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection": {"paraphrase": None, "once": None}}, "the facts are also what is probed"),
        ({"downstream": {"tasks": ["scqi"]}}, "Did you mean 'sciq'"),
        ({"num_workers": 2}, "executor inline has one worker"),
        ({"micro_batch_size": 3}, "choose a micro_batch_size that divides"),
        ({"seeds": (1, 1)}, "must be different"),
        (
            {"resuscitation": {"ratio": 0.5, "factor": 1}, "entropy": None},
            "needs mean coefficients",
        ),
        ({"resuscitation": {"ratio": 1.5, "factor": 1}}, "resuscitation.ratio"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_continual(tmp_path, tmp_path, **changes)


def test_task_names_are_those_of_the_evaluation() -> None:
    from ke_ray.evaluation.downstream import TASK_METRICS

    assert set(ALL_TASKS) == set(TASK_METRICS)


@pytest.mark.parametrize(
    ("batch", "epochs", "steps", "interval"),
    [(128, 1, 1600, 160), (2048, 1, 100, 10), (128, 3, 4800, 160)],
)
def test_the_papers_step_arithmetic(batch: int, epochs: int, steps: int, interval: int) -> None:
    from ke_ray.data.facts import Fact, FactSet
    from ke_ray.data.injection import plan_injections
    from ke_ray.data.injection_schedule import schedule_from_facts

    study = validate(
        ContinualStudy,
        {
            "kind": "continual",
            "starts": {"spec": "x"},
            "corpus": {"source": "y", "num_instances": 204800},
            "global_batch_size": batch,
            "epochs": epochs,
            "output": "z",
            "probes": {"around_injections": False, "every": interval},
        },
        "study",
    )
    num_steps = epochs * (204800 // study.global_batch_size)
    assert num_steps == steps
    fact = Fact(("text",) * 10, {"memorization": (("a", "b"),)})
    facts = FactSet("paraphrase", (fact,) * 3)
    plan = plan_injections(
        schedule_from_facts([facts]),
        num_steps=num_steps,
        global_batch=batch,
        sequence_length=1024,
        epochs=epochs,
        tokenizer=_Words(),  # type: ignore[arg-type]
        eos_token_id=0,
        facts=[facts],
    )
    assert plan.injection_steps() == tuple(range(interval, steps + 1, interval))
    assert probe_steps(study, plan, num_steps)[-1] == steps


class _Words:
    """Stands for a tokenizer where only the number of steps matters."""

    class _Encoding:
        ids = (5, 6)

    def encode(self, *_: object, **__: object) -> _Encoding:
        return self._Encoding()


def test_probes_of_the_run_are_those_of_the_facts(finished: ContinualStudy) -> None:
    spec = list_runs(finished)[-1]
    start = read_start(finished, spec.ref, spec.ref.location)
    inputs = load_inputs(finished, start, 0)
    model = load_model(spec.ref.location)
    items = read_table(part(finished) / "probe_items.parquet").to_pandas().query("step == 0")
    scores = score_probes(model, inputs.questions.probes)
    np.testing.assert_allclose(items["logprob_summed"], scores.logprob_summed, atol=1e-6)
    assert build_probes([], start.tokenizer) == []


def test_mlflow_knows_the_end_before_the_row_says_finished(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from ke_ray.training import continual

    uri, statuses = f"sqlite:///{tmp_path}/mlflow.db", []

    def write_row(study: ContinualStudy, spec: object, row: dict) -> None:
        statuses.append(MlflowClient(uri).get_run(row["mlflow_run_id"]).info.status)

    monkeypatch.setattr(continual, "write_row", write_row)
    only = dict.fromkeys(("injection", "downstream", "held_out", "entropy"))
    study = tiny_continual(tmp_path / "out", series, **only, mlflow={"enabled": True, "uri": uri})
    run_continual(study, list_runs(study)[-1])
    assert statuses == ["FINISHED"]


def test_one_relative_folder_in_two_places_makes_two_mlflow_runs(
    tmp_path: Path, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    mlflow = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "both"}
    only = dict.fromkeys(("injection", "downstream", "held_out", "entropy"))
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        run_pretrain(tiny_pretrain(Path("start"), mlflow=mlflow))
        study = tiny_continual(Path("out"), series, **only, mlflow=mlflow)
        run_continual(study, list_runs(study)[-1])
    client = MlflowClient(mlflow["uri"])
    experiment = client.get_experiment_by_name("both")
    kinds = [r.data.tags["ke_ray.kind"] for r in client.search_runs([experiment.experiment_id])]
    assert sorted(kinds) == ["continual", "continual", "pretrain", "pretrain"]
