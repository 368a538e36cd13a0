"""Measures by intervention through a whole scan: merged parts, tables, report, identity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ke_ray.core.measures import unregister
from ke_ray.errors import ResultsError
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model
from ke_ray.planning import scan_items as plan
from ke_ray.planning.scan import prepare_scan
from ke_ray.report.build import build_report
from ke_ray.results import ScanFolder

NAMES = ("sensitivity_all_0.1", "masking_most_0.1")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_pieces_of_a_scan_make_the_values_of_the_whole_in_tables_and_report(
    scan, scan_study, series, token_ids, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "MIN_TOKENS_OF_A_CUT", 1)
    monkeypatch.setitem(plan.BYTES_PER_S, "here", 1e15)  # checkpoints come in pieces
    keys: dict[str, Any] = {"intervention_instances": 20, "noise_seeds": 2}
    steps = {"spec": str(series), "steps": "10:30"}
    study = scan_study(checkpoints=steps, measures=("gini", *NAMES), num_actors=2, **keys)
    assert scan(study).exit_code == 0
    table = ScanFolder.open(study.output).entropy().to_pylist()
    rows = {(r["checkpoint"], r["measure"]): r for r in table if r["layer"] is None}
    ids = np.load(token_ids).astype(np.int64)
    for name in ("step10", "step20", "step30"):
        for row in score_model(load_model(series / name), ids, measures=NAMES, **keys).rows:
            assert row.value != 0
            found = rows[name, row.measure]
            assert found["value"] == pytest.approx(row.value, rel=1e-3)
            assert found["stderr"] == pytest.approx(row.stderr, rel=1e-2)
            assert found["unit"] == "nats"

    # Other draws are another measure; what does not intervene may be added with any.
    changed = {"checkpoints": steps, "noise_seeds": 3, "intervention_instances": 20}
    with pytest.raises(ResultsError, match=r"all_0\.1' over 20 instances, 2 draws.*noise_seeds"):
        prepare_scan(scan_study(measures=NAMES, **changed))
    prepare_scan(scan_study(measures=("rank_me", "sensitivity_all_0.2"), **changed))

    for name in (*NAMES, "sensitivity_all_0.2"):  # a report is read where nobody named them
        unregister(name)
    page = tmp_path / "report.html"
    build_report([study.output], page)
    assert "Sensitivity to noise on all weights, γ = 0.1" in page.read_text()
