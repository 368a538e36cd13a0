"""Sweep files: what they say, and what they must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ke_ray.config import validate
from ke_ray.errors import ConfigError
from ke_ray.planning.sweep import fixed_points, trial_study, value_at
from ke_ray.planning.sweep_forecast import measure_sweep
from ke_ray.planning.training_forecast import num_tokens
from ke_ray.results.columns import OBJECTIVES
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.sweep import SweepStudy, load_sweep, sweep_keys

SWEEPS = Path(__file__).parents[2] / "sweeps"
SHIPPED = sorted(
    path.name for path in SWEEPS.glob("*.yaml") if "kind: sweep" in path.read_text("utf-8")
)
BASE = {
    "kind": "continual",
    "starts": {"spec": "series"},
    "corpus": {"source": "docs.jsonl", "num_instances": 64},
    "sequence_length": 32,
    "global_batch_size": 8,
    "injection": {"paraphrase": "facts.json"},
    "downstream": {"tasks": ["sciq"]},
    "entropy": {"source": "old.jsonl"},
    "resuscitation": {"ratio": 0.5, "factor": 1.0},
}


def write(folder: Path, **changes: object) -> Path:
    """A sweep file over :data:`BASE`; None removes a key."""
    values = {
        "kind": "sweep",
        "base": BASE,
        "space": {"resuscitation.factor": [0.5, 2]},
        "output": str(folder / "out"),
        **changes,
    }
    path = folder / "sweep.yaml"
    text = yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False)
    path.write_text(text)
    return path


def refusal(folder: Path, overrides: tuple[str, ...] = (), **changes: object) -> str:
    with pytest.raises(ConfigError) as told:
        measure_sweep(load_sweep(write(folder, **changes), overrides))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_the_shipped_sweeps_are_the_issues() -> None:
    names = {"demo", "resuscitation_q", "resuscitation_p", "resuscitation_stage", "table1"}
    assert {f"{name}.yaml" for name in (*names, "pareto")} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_has_only_valid_points(name: str) -> None:
    study = load_sweep(SWEEPS / name)
    found = measure_sweep(study)
    assert found.num_trials >= 4
    assert found.tokens
    assert study.base.keep_final is False, "dozens of models would be kept"


def test_the_sweep_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (SWEEPS.parent / "docs" / "sweeps.md").read_text("utf-8")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        text.split("```yaml\n")[1].split("```")[0].replace("base: ", f"base: {SWEEPS}/")
    )
    found = measure_sweep(load_sweep(path))
    assert (found.num_points, found.num_trials) == (2 + 9, 2 * 11)
    assert all(f"`{name}`" in text for name in OBJECTIVES)
    assert all(f"`{name}`" in text for name in SHIPPED if not name.startswith("dolma"))


def test_table1_has_the_papers_rows_at_every_stage() -> None:
    study = load_sweep(SWEEPS / "table1.yaml")
    stages: dict[int, set[tuple[int, float, int]]] = {}
    for point in fixed_points(study):
        values = trial_study(study, point, 6198).model_dump()
        rates = value_at(values, "optimizer.learning_rate")
        setting = (values["global_batch_size"], rates, values["epochs"])
        stages.setdefault(point.params["checkpoint"], set()).add(setting)
    rows = {(128, 4e-4, 1), (2048, 4e-4, 1), (128, 1e-3, 1), (128, 1e-4, 1), (128, 4e-4, 3)}
    assert stages == dict.fromkeys((118000, 369000, 554000, 738020), rows)


def test_fig5_has_its_factors_its_original_and_three_controls() -> None:
    study = load_sweep(SWEEPS / "resuscitation_q.yaml")
    seen = {
        (value_at(v, "resuscitation.factor"), value_at(v, "resuscitation.control"))
        for v in (trial_study(study, point, 0).model_dump() for point in fixed_points(study))
    }
    controls = {(2, name) for name in ("random", "matched_norm", "attention_temperature")}
    assert seen == {(None, None), *((q, None) for q in (0.5, 1, 2, 3)), *controls}


def test_a_base_file_takes_changes_and_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE | {"output": "elsewhere"}))
    path = write(
        tmp_path, base="base.yaml", changes={"resuscitation.ratio": 0.25, "optimizer.eps": 1e-6}
    )
    study = load_sweep(path, ["base.resuscitation.ratio=0.75", "output=other"])
    assert study.base.resuscitation is not None
    assert study.base.resuscitation.ratio == 0.75
    assert study.base.optimizer.eps == 1e-6
    assert study.base.output == study.output == "other"


def test_points_come_first_and_a_grid_spans_the_space(tmp_path: Path) -> None:
    study = load_sweep(
        write(
            tmp_path,
            space={
                "resuscitation.ratio": [0.25, 0.5],
                "epochs": {"int": [1, 3]},
            },
            points=[{"resuscitation": None}, {"resuscitation.ratio": 0.25, "epochs": 2}],
            seeds=[3, 4],
        )
    )
    points = [point.params for point in fixed_points(study)]
    assert points[0] == {"resuscitation": None}
    grid = {(p["resuscitation.ratio"], p["epochs"]) for p in points[1:]}
    assert grid == {(ratio, n) for ratio in (0.25, 0.5) for n in (1, 2, 3)}
    assert len(points) == 7, "a point that the grid holds too is tried once"
    found = measure_sweep(study)
    assert (found.num_points, found.num_trials) == (7, 14)
    one_epoch = 64 * 32
    assert found.tokens == 2 * one_epoch * (1 + 2 * (1 + 2 + 3))


def test_random_draws_are_the_same_every_time_and_inside_the_space(tmp_path: Path) -> None:
    keys = {
        "optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "resuscitation.ratio": {"uniform": [0.2, 0.4]},
        "resuscitation.control": ["random", None],
    }
    path = write(tmp_path, space=keys, search="random", num_trials=200)
    study = load_sweep(path)
    points = [point.params for point in fixed_points(study)]
    assert points == [point.params for point in fixed_points(load_sweep(path))]
    rates = sorted(point["optimizer.learning_rate"] for point in points)
    assert 1e-5 <= rates[0] < 3e-5
    assert 3e-3 < rates[-1] <= 1e-2
    # Uniform in the logarithm: the median is near its middle, 3e-4, not near 5e-3.
    assert 1.5e-4 < rates[100] < 7e-4
    assert all(0.2 <= point["resuscitation.ratio"] <= 0.4 for point in points)
    assert {point["resuscitation.control"] for point in points} == {"random", None}
    other = load_sweep(write(tmp_path, space=keys, search="random", num_trials=9, search_seed=1))
    assert fixed_points(other)[0].params != points[0]


def test_every_leaf_of_a_continual_study_that_changes_results_can_be_swept() -> None:
    keys = sweep_keys()
    assert {
        *("resuscitation.ratio", "resuscitation.factor", "resuscitation.control"),
        *("optimizer.learning_rate", "global_batch_size", "starts.spec", "corpus.source"),
        *("epochs", "seed", "checkpoint", "injection.count", "schedule.warmup_fraction"),
    } <= keys
    assert not {"output", "num_workers", "mlflow.uri", "seeds", "kind"} & keys


def test_tokens_of_a_trial_follow_from_whole_steps() -> None:
    keys = {**BASE, "output": "out", "corpus": {"source": "x", "num_instances": 100}}
    study = validate(ContinualStudy, {**keys, "epochs": 3}, "here")
    assert num_tokens(study) == 3 * (100 // 8) * 8 * 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"spaces": {}}, "unknown key 'spaces'. Did you mean 'space'?"),
        ({"space": {"resuscitate.ratio": [0.5]}}, "Did you mean 'resuscitation.ratio'?"),
        ({"space": {"lerning_rate": [1e-3]}}, "unknown sweep key 'lerning_rate'"),
        ({"space": {"seeds": [1]}}, "Did you mean 'seed'?"),
        ({"space": {"output": ["a"]}}, "cannot be swept: it does not change"),
        ({"points": [{"epoch": 3}]}, "Did you mean 'epochs'?"),
        ({"space": {"resuscitation.ratio": [0, 0.5]}}, "'resuscitation.ratio'"),
        ({"space": {"resuscitation.ratio": [1.5]}}, "less than or equal to 1"),
        ({"space": {"resuscitation.factor": [-1]}}, "greater than 0"),
        ({"points": [{"resuscitation.factor": 0}]}, "greater than 0"),
        ({"space": {"resuscitation.factor": []}}, "choice has no values"),
        ({"space": {"resuscitation.factor": [1, 1]}}, "holds a value twice"),
        ({"space": {"epochs": {"uniform": [1, 2]}}}, "a grid needs choice or int"),
        ({"space": {"epochs": {"choice": [1], "int": [1, 2]}}}, "exactly one of"),
        ({"space": {"epochs": {"chioce": [1]}}}, "unknown key 'space.epochs.chioce'"),
        ({"space": None}, "nothing to try"),
        ({"num_trials": 3}, "a grid has all its points"),
        ({"search": "random"}, "needs num_trials"),
        ({"search": "rand"}, "'search'"),
        ({"search": "random", "num_trials": 3}, "only 2 different points"),
        ({"objectives": ["aquisition"]}, "Did you mean 'acquisition'?"),
        ({"objectives": ["perplexity_after"]}, "no trial would report the objective"),
        ({"objectives": ["acquisition", "acquisition"]}, "objectives acquisition, acquisition"),
        ({"objectives": []}, "'objectives'"),
        ({"space": {"seed": [1, 2]}, "seeds": [0]}, "not both"),
        ({"seeds": [1, 1]}, "must be different"),
        ({"base": "none.yaml"}, "There is no file"),
        ({"base": None}, "'base' must be a continual study"),
        ({"base": {**BASE, "epoch": 1}}, "Did you mean 'epochs'?"),
        ({"scheduler": {"name": "asha"}, "seeds": [0, 1]}, "would be biased"),
        ({"scheduler": {"name": "asha"}, "base": {**BASE, "num_workers": 2}}, "num_workers: 1"),
        ({"scheduler": {"name": "hyperband"}}, "'scheduler.name'"),
        ({"cpus_per_trial": 0}, "'cpus_per_trial'"),
    ],
)
def test_bad_sweeps_are_one_message(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    assert expected in refusal(tmp_path, **changes)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"resuscitation": [None, {"ratio": 0.5, "factor": 1}]}, "Optuna takes numbers, texts"),
        ({"starts.nearest": [[1], [2]]}, "Optuna takes numbers, texts"),
        ({"optimizer.learning_rate": {"loguniform": [0, 1]}}, "needs a low end above 0"),
        ({"optimizer.learning_rate": {"uniform": [1, 0.1]}}, "is empty"),
        ({"resuscitation.ratio": {"uniform": [0.5, 1.2]}}, "less than or equal to 1"),
        ({"epochs": {"uniform": [1, 3]}}, "'epochs': Input should be a valid integer"),
        ({"seed": {"loguniform": [1, 100]}}, "must be a whole number"),
        ({"seed": {"int": [0, 10**30]}}, "beyond 64 bits"),
        ({"resuscitation.factor": [1, 2]}, "only 2 different points"),
        ({"resuscitation.factor": [1, 1.0, 2, 3]}, "holds a value twice"),
        ({"optimizer.learning_rate": {"uniform": [0.1, float("inf")]}}, "finite"),
        ({"resuscitation.factor": {"uniform": [0, 2]}}, "greater than 0"),
    ],
)
def test_spaces_that_tpe_cannot_take(
    tmp_path: Path, space: dict[str, object], expected: str
) -> None:
    assert expected in refusal(tmp_path, space=space, search="tpe", num_trials=4)


def test_directions_are_the_usual_ones_unless_given(tmp_path: Path) -> None:
    study = load_sweep(
        write(
            tmp_path, objectives=["forgetting", {"metric": "acquisition", "direction": "minimize"}]
        )
    )
    assert [o.direction for o in study.objectives] == ["minimize", "minimize"]
    assert OBJECTIVES["acquisition"].direction == "maximize"


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("kind: scan\n")
    with pytest.raises(ConfigError, match="kind 'scan'"):
        load_sweep(path)
    path.write_text(json.dumps({"kind": "sweep", "base": [1]}))
    with pytest.raises(ConfigError, match="'base' must be a continual study"):
        load_sweep(path)


def test_a_study_survives_its_own_dump(tmp_path: Path) -> None:
    path = write(tmp_path, space={"epochs": {"int": [1, 2]}}, points=[{"resuscitation": None}])
    study = load_sweep(path)
    again = validate(SweepStudy, study.model_dump(mode="json", by_alias=True), "dump")
    assert again == study


def test_a_measure_is_an_objective_where_the_base_takes_it(tmp_path: Path) -> None:
    text = {"source": "wiki.npy", "measures": ["loss", "rank_me"]}
    measured = {**BASE, "entropy": text}
    wanted = ["loss", {"metric": "rank_me", "direction": "maximize"}]
    study = load_sweep(write(tmp_path, base=measured, objectives=wanted))
    assert [o.direction for o in study.objectives] == ["minimize", "maximize"]
    for base, objectives, remedy in (
        (measured, ["rank_me"], "direction: maximize"),
        (measured, ["perplexity"], r"name it in base\.entropy\.measures \(loss, rank_me\)"),
        (BASE, ["loss"], r"name it in base\.entropy\.measures"),
        (measured, ["rank_you"], "unknown objective 'rank_you'"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            load_sweep(write(tmp_path, base=base, objectives=objectives))
