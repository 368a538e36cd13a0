"""A scan of resuscitated checkpoints: in memory, from the coefficients of their own scan."""

from __future__ import annotations

import pytest
import torch

from ke_ray.core.resuscitation import multipliers, predicted_entropy_nats
from ke_ray.errors import ResultsError
from ke_ray.results import ScanFolder
from ke_ray.resuscitation.prediction import prediction_lines, read_predictions, write_predictions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_the_first_layer_becomes_what_was_predicted(scan, scan_study, series, tmp_path):
    plain = scan_study(measures=("knowledge_entropy",), checkpoints={"spec": f"{series}/step20"})
    scan(plain)
    keys = {"ratio": 0.5, "factor": 2.0, "coefficients": plain.output}
    revived = scan_study(
        measures=("knowledge_entropy",),
        # Both: the coefficients are those of step20 alone, so step30 must be refused.
        checkpoints={"spec": str(series), "steps": "20:30"},
        resuscitation=keys,
        output=str(tmp_path / "revived"),
    )
    outcome = scan(revived)
    assert [name for name, _ in outcome.failures] == ["step30"]
    assert "no coefficients of these weights" in outcome.failures[0][1]
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


def test_without_coefficients_they_are_measured_first(scan, scan_study, series, tmp_path):
    """``--resuscitate ratio=0.5,factor=2`` alone: the same as from a scan of the same data."""
    plain = scan_study(measures=("knowledge_entropy",), checkpoints={"spec": f"{series}/step20"})
    scan(plain)
    found = []
    for coefficients in (plain.output, None):
        keys = {"ratio": 0.5, "factor": 2.0, "coefficients": coefficients}
        study = scan_study(
            measures=("knowledge_entropy",),
            checkpoints={"spec": f"{series}/step20"},
            resuscitation=keys,
            output=str(tmp_path / f"revived{coefficients is None}"),
        )
        assert scan(study).exit_code == 0
        found.append({row["layer"]: row for row in write_predictions(study.output)})
    for layer, row in found[0].items():
        for name in ("before_nats", "predicted_nats", "measured_nats"):
            assert found[1][layer][name] == pytest.approx(row[name], abs=1e-6)
    assert found[1][None]["coefficients"] == "measured before"
    assert found[1][None]["coefficients_verified"] is True
    # C̄ of other data would be another model's: not to be mixed into the same folder.
    other = study.model_copy(update={"num_instances": 40, "data": {"more": study.data["ids"]}})
    with pytest.raises(ResultsError, match="resuscitation"):
        scan(other)
