"""A scan of resuscitated checkpoints: in memory, from the coefficients of their own scan."""

from __future__ import annotations

import pytest
import torch
from tiny_scans import make_study

from ke_ray.core.resuscitation import multipliers, predicted_entropy_nats
from ke_ray.errors import ResultsError
from ke_ray.results import ScanFolder
from ke_ray.resuscitation.prediction import prediction_lines, read_predictions, write_predictions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


KEYS = {"measures": ("knowledge_entropy",)}


@pytest.fixture(scope="module")
def plain(ray_cluster, scan, series, token_ids, tmp_path_factory):
    """A scan of ``step20`` as it is."""
    folder = tmp_path_factory.mktemp("plain") / "scan"
    spec = {"spec": f"{series}/step20"}
    study = make_study(series, token_ids, folder, checkpoints=spec, **KEYS)
    scan(study)
    return study


@pytest.fixture(scope="module")
def revived(plain, scan, series, token_ids, tmp_path_factory):
    """Both checkpoints resuscitated with the coefficients of that one: the study, how it went."""
    study = make_study(
        series,
        token_ids,
        tmp_path_factory.mktemp("revived") / "scan",
        checkpoints={"spec": str(series), "steps": "20:30"},
        resuscitation={"ratio": 0.5, "factor": 2.0, "coefficients": plain.output},
        **KEYS,
    )
    return study, scan(study)


def test_coefficients_of_other_weights_are_refused(revived):
    outcome = revived[1]
    assert [name for name, _ in outcome.failures] == ["step30"]
    assert "no coefficients of these weights" in outcome.failures[0][1]


def test_the_first_layer_becomes_what_was_predicted(plain, revived):
    revived, _ = revived
    mean = torch.from_numpy(ScanFolder.open(plain.output).mean_coefficients("step20"))
    predicted = predicted_entropy_nats(mean, multipliers(mean, 0.5, 2.0))
    found = {
        (row["checkpoint"], row["layer"]): row["value"]
        for row in ScanFolder.open(revived.output).entropy().to_pylist()
    }
    assert found["step20", 0] == pytest.approx(float(predicted[0]), abs=1e-5)
    # Deeper layers get other inputs; the prediction holds those fixed.
    assert found["step20", 1] == pytest.approx(float(predicted[1]), abs=0.2)

    before = {
        row["layer"]: row["value"] for row in ScanFolder.open(plain.output).entropy().to_pylist()
    }
    rows = {row["layer"]: row for row in write_predictions(revived.output)}
    assert set(rows) == {0, 1, None}
    for layer, row in rows.items():
        assert row["checkpoint"] == "step20"
        assert row["measured_nats"] == found["step20", layer]
        assert row["before_nats"] == pytest.approx(before[layer], abs=1e-6)
        expected = predicted.sum() if layer is None else predicted[layer]
        assert row["predicted_nats"] == pytest.approx(float(expected), abs=1e-12)
        assert row["coefficients_verified"] is True
    assert read_predictions(revived.output)[-1]["ratio"] == 0.5
    lines = prediction_lines(read_predictions(revived.output))
    numbers = [f"{rows[None][name]:.4f}" for name in ("before_nats", "predicted_nats")]
    assert lines[-1].split() == ["step20", *numbers, f"{found['step20', None]:.4f}", "ids"]
    assert write_predictions(plain.output) == []


def test_without_coefficients_they_are_measured_first(revived, scan, scan_study, series, tmp_path):
    """``--resuscitate ratio=0.5,factor=2`` alone: the same as from a scan of the same data."""
    study = scan_study(
        checkpoints={"spec": f"{series}/step20"},
        resuscitation={"ratio": 0.5, "factor": 2.0},
        output=str(tmp_path / "alone"),
        **KEYS,
    )
    assert scan(study).exit_code == 0
    found = [
        {row["layer"]: row for row in write_predictions(output)}
        for output in (revived[0].output, study.output)
    ]
    for layer, row in found[0].items():
        for name in ("before_nats", "predicted_nats", "measured_nats"):
            assert found[1][layer][name] == pytest.approx(row[name], abs=1e-6)
    assert found[1][None]["coefficients"] == "measured before"
    assert found[1][None]["coefficients_verified"] is True
    # C̄ of other data would be another model's: not to be mixed into the same folder.
    other = study.model_copy(update={"num_instances": 40, "data": {"more": study.data["ids"]}})
    with pytest.raises(ResultsError, match="resuscitation"):
        scan(other)
