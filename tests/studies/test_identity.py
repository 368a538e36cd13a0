"""The identity of a study: what changes a result, whatever the order, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_studies import tiny_continual, tiny_pretrain

from ke_ray.errors import ConfigError, ResultsError
from ke_ray.studies.identity import (
    IDENTITY_VERSION,
    check_same_study,
    identity,
    identity_fields,
    identity_keys,
)
from ke_ray.studies.sweep import SweepStudy, sweep_keys


@pytest.mark.parametrize(
    "change",
    [
        {"name": "x"},
        {"micro_batch_size": 2},
        {"keep_state": True},
        {"save_every": 3},
        {"mlflow": {"enabled": True, "experiment": "other"}},
        {"entropy": {"batch_size": 1}},
        {"held_out": {"batch_size": 1}},
        {"probes": {"batch_tokens": 64}},
        {"downstream": {"batch_tokens": 64}},
    ],
    ids=str,
)
def test_a_key_that_says_how_or_where_changes_no_identity(change: dict[str, Any]) -> None:
    study = tiny_continual(Path("out"), Path("series"))
    changed = tiny_continual(Path("out"), Path("series"), **change)
    assert identity(identity_keys(changed)) == identity(identity_keys(study))
    moved = tiny_continual(Path("elsewhere"), Path("series"), **change)
    assert identity(identity_keys(moved)) == identity(identity_keys(study))


def test_accepting_other_weights_changes_no_identity() -> None:
    """Runs that had no result without it may go on, and finished ones stay."""
    given = {"ratio": 0.5, "factor": 2.0, "coefficients": "scan"}
    studies = [
        tiny_continual(Path("out"), Path("series"), resuscitation={**given, **change})
        for change in ({}, {"allow_mismatch": True})
    ]
    assert identity_keys(studies[0]) == identity_keys(studies[1])
    assert identity_keys(studies[0])["resuscitation"] == given


def test_texts_differ_in_where_their_instances_come_from_by_default() -> None:
    """Perplexity is of the beginning of its source, as it always was."""
    study = tiny_continual(Path("out"), Path("series"))
    assert study.entropy is not None
    assert study.held_out is not None
    assert (study.entropy.sampling, study.held_out.sampling) == ("spread", "first")
    assert (study.entropy.name, study.held_out.name) == ("entropy", "held_out")
    assert identity_keys(study)["held_out"].keys() == {"source", "num_instances"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"learning_rate": 0.02}}, "optimizer.learning_rate was 0.01, is 0.02"),
        ({"strategy": "fsdp"}, 'strategy was the default, is "fsdp"'),
        ({"precision": "bfloat16"}, 'precision was the default, is "bfloat16"'),
        ({"data": {"biographies": {"seed": 4}}}, "biographies.seed was the default, is 4"),
    ],
    ids=str,
)
def test_a_key_that_changes_a_result_is_named(change: dict[str, Any], message: str) -> None:
    before = identity_fields(identity_keys(tiny_pretrain(Path("out"))))
    now = identity_keys(tiny_pretrain(Path("out"), **change))
    with pytest.raises(ResultsError, match=message):
        check_same_study("out", before, now)


def test_a_key_at_its_default_is_no_part_of_the_identity() -> None:
    study = tiny_pretrain(Path("out"))
    spelled_out = tiny_pretrain(Path("out"), schedule=study.schedule.model_dump())
    assert identity_keys(spelled_out) == identity_keys(study)
    assert "schedule" not in identity_keys(study)


def test_a_group_that_is_there_differs_from_none_even_at_its_defaults() -> None:
    with_group = tiny_continual(Path("out"), Path("series"), injection={"count": None})
    assert "injection" in identity_keys(with_group)
    without = tiny_continual(Path("out"), Path("series"), injection=None)
    assert "injection" not in identity_keys(without)


def test_a_folder_of_the_older_identity_is_recognised() -> None:
    manifest = {"identity": "0" * 64, "versions": {"ke_ray": "0.1.0"}}
    assert manifest.get("identity_version") != IDENTITY_VERSION
    with pytest.raises(ResultsError, match="0.1.0.*another output folder"):
        check_same_study("out", manifest, identity_keys(tiny_pretrain(Path("out"))))


def test_only_keys_that_change_a_result_can_be_swept() -> None:
    swept = sweep_keys()
    assert {"optimizer.learning_rate", "strategy", "entropy.num_instances"} <= swept
    assert not swept & {"keep_state", "entropy.batch_size", "mlflow.uri", "output", "seeds", "kind"}
    base = tiny_continual(Path("out"), Path("series")).model_dump(mode="json", exclude_unset=True)
    for key in ("keep_state", "probes.batch_tokens"):
        study = {"output": "out", "base": base, "space": {key: [1, 2]}}
        with pytest.raises(ValueError, match=f"'{key}' cannot be swept"):
            SweepStudy.model_validate(study)
    with pytest.raises(ValueError, match="Did you mean 'seed'"):
        SweepStudy.model_validate({"output": "out", "base": base, "space": {"seeds": [1]}})


def test_a_key_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    from ke_ray.config import set_keys

    assert set_keys({"a": None}, {"a.b": 1, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
    with pytest.raises(ConfigError, match="'a.b'.*'a' is 3"):
        set_keys({"a": 3}, {"a.b": 1})
