"""A wrong study file is one clear message; numbers are read as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_ray.config import load_study
from ke_ray.errors import ConfigError, UserError
from ke_ray.storage.safe_yaml import parse_yaml
from ke_ray.studies.scan import ScanStudy

STUDY = """
kind: scan
checkpoints: {spec: checkpoints}
data: {dolma: documents.jsonl}
output: out
"""


def write(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_exponents_without_a_point_are_numbers():
    assert parse_yaml("{a: 4e-4, b: -1E5, c: 1.5e3, d: 12, e: 1e, f: e5}", "x") == {
        "a": 4e-4,
        "b": -1e5,
        "c": 1500.0,
        "d": 12,
        "e": "1e",
        "f": "e5",
    }


def test_overrides_win_and_are_typed(tmp_path):
    study = load_study(
        write(tmp_path, STUDY),
        ScanStudy,
        ["num_instances=7", "checkpoints.every=3", "measures=[gini]", "data.c4=c4.jsonl"],
    )
    assert study.num_instances == 7
    assert study.checkpoints.every == 3
    assert study.measures == ("gini",)
    assert set(study.data) == {"dolma", "c4"}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (STUDY + "nuM_instance: 5", [], "unknown key 'nuM_instance'. Did you mean 'num_instances'"),
        (STUDY, ["checkpoints.evry=2"], "unknown key 'checkpoints.evry'. Did you mean 'every'"),
        (STUDY + "num_instances: many", [], "'num_instances': .*integer.*given: 'many'"),
        (STUDY + "measures: [knowledge_entrophy]", [], "Did you mean 'knowledge_entropy'"),
        (STUDY, ["num_instances"], "is not KEY=VALUE"),
        (STUDY, ["output.x=1"], "'output' is 'out'"),
        ("kind: sweep", [], "has kind 'sweep'; expected a study with 'kind: scan'"),
        ("- a\n- b", [], "holds list, expected a mapping"),
        ("a: [1", [], r"line \d is not valid YAML"),
        ("a: &x [1]\nb: *x", [], "uses YAML aliases"),
        (STUDY.replace("dolma", "'../x'"), [], "is no corpus name"),
        (
            STUDY + "mlflow: {uri: 'http://user:secret@host'}",
            [],
            "holds a user name or password",
        ),
    ],
)
def test_a_wrong_study_is_one_clear_message(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_study(write(tmp_path, text), ScanStudy, overrides)
    assert "study.yaml" in str(caught.value) or "--set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file():
    with pytest.raises(ConfigError, match="There is no file 'nowhere.yaml'"):
        load_study("nowhere.yaml", ScanStudy)


@pytest.mark.parametrize(
    "text",
    ["!!bool maybe", "!!int ''", "!!float ''", "!!timestamp noon", f"0x{'f' * 5000}"],
)
def test_a_value_that_cannot_be_read_is_no_valid_yaml(text):
    with pytest.raises(ConfigError, match="study.yaml is not valid YAML"):
        parse_yaml(text, "study.yaml")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    try:
        parse_yaml(text, "x")
    except UserError as error:
        assert str(error)
