"""Hybrids, ALiBi and unequal layers in a scan: null with a reason, and everything else given."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ke_ray.core.measures import MEASURES
from ke_ray.models.saving import save_model
from ke_ray.models.scoring import score_model
from ke_ray.planning import scan_items as plan
from ke_ray.report.build import build_report
from ke_ray.report.sources import find_results
from ke_ray.report.terminal import headline_rows, print_results
from ke_ray.results import ScanFolder
from ke_ray.studies.scan import ScanStudy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
TYPES = {"step1": "lfm2", "step2": "gemma3n_text", "step3": "bloom"}


@pytest.fixture(scope="module")
def models(tiny_decoder):
    return {name: tiny_decoder(model_type) for name, model_type in TYPES.items()}


@pytest.fixture(scope="module")
def scanned(models, scan, ray_cluster, tmp_path_factory):
    """A scan whose checkpoints are cut, so that sums and what layers lack travel in parts."""
    folder = tmp_path_factory.mktemp("differ")
    for name, model in models.items():
        save_model(model, folder / "series" / name)
    ids = np.random.default_rng(0).integers(3, 97, (20, 12)).astype(np.uint16)
    np.save(folder / "ids.npy", ids)
    study = ScanStudy.model_validate(
        {
            "checkpoints": {"spec": str(folder / "series")},
            "data": {"ids": str(folder / "ids.npy")},
            "num_instances": 20,
            "sequence_length": 12,
            "eos_token_id": 2,
            "measures": list(MEASURES),
            "num_actors": 2,
            "output": str(folder / "out"),
            "mlflow": {"enabled": False},
        }
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan, "MIN_TOKENS_OF_A_CUT", 1)
        monkeypatch.setitem(plan.BYTES_PER_S, "here", 1e15)
        outcome = scan(study)
    assert outcome.exit_code == 0, outcome.failures
    return study.output, ids.astype(np.int64)


def test_nulls_have_their_reason_and_the_rest_is_what_scoring_gives(scanned, models):
    output, ids = scanned
    rows = {
        (row["checkpoint"], row["layer"], row["measure"]): row
        for row in ScanFolder.open(output).entropy().to_pylist()
    }
    for name, model in models.items():
        for own in score_model(model, ids, measures=tuple(MEASURES)).rows:
            row = rows.pop((name, own.layer, own.measure))
            assert (row["status"], row["reason"], row["d_mlp"]) == ("ok", own.reason, own.d_mlp)
            if own.reason is None:
                assert row["value"] == pytest.approx(own.value, abs=1e-6)
            else:
                assert (row["value"], row["stderr"]) == (None, None)
    assert rows == {}


def test_a_second_run_finds_nothing_to_do(scanned, scan):
    output, _ = scanned
    study = ScanStudy.model_validate(
        json.loads(json.dumps(ScanFolder.open(output).manifest["config"]))
    )
    assert scan(study).num_done == 0


def test_tables_and_pages_say_what_is_null_and_bound_every_layer_by_its_own_width(
    scanned, capsys, tmp_path
):
    output, _ = scanned
    print_results([output])
    text = " ".join(capsys.readouterr().out.split())
    assert "attention_entropy is null in 2 of 3 layers: the layer has no softmax attention" in text
    assert "attention_entropy is null in 2 of 2 layers: attention scores carry ALiBi's" in text
    assert f"ceiling 2·ln 48 + 1·ln 64 = {2 * math.log(48) + math.log(64):.4g} nats" in text
    rows = {row["checkpoint"]: row for row in headline_rows([output])}
    assert rows["step3"]["attention_entropy"] is None
    assert rows["step1"]["attention_entropy"] > 0
    assert len(find_results([output])) == 1
    page = tmp_path / "report.html"
    build_report([output], page)
    assert "no softmax attention" in page.read_text()
