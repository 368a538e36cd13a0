"""A measure of a file through a whole scan: scorers, merged parts, tables, report, identity."""

from __future__ import annotations

import shutil
from pathlib import Path

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

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "spread.py"


def test_a_measure_of_a_file_is_scanned_merged_reported_and_told_apart(
    scan, scan_study, series, token_ids, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "MIN_TOKENS_OF_A_CUT", 1)
    monkeypatch.setitem(plan.BYTES_PER_S, "here", 1e15)  # checkpoints come in pieces
    mine = shutil.copy(EXAMPLE, tmp_path / "mine.py")
    own = (f"{mine}:spread",)
    steps = {"spec": str(series), "steps": "10:30"}
    study = scan_study(checkpoints=steps, measures=("gini",), own_measures=own, num_actors=2)
    assert scan(study).exit_code == 0
    folder = ScanFolder.open(study.output)
    rows = {(r["checkpoint"], r["layer"], r["measure"]): r for r in folder.entropy().to_pylist()}
    assert {key[2] for key in rows} == {"gini", "spread"}
    ids = np.load(token_ids).astype(np.int64)
    for name in sorted({key[0] for key in rows}):
        for row in score_model(load_model(series / name), ids, measures="spread").rows:
            own_row = rows[name, row.layer, "spread"]
            assert own_row["value"] == pytest.approx(row.value, rel=1e-5)
            assert own_row["stderr"] == pytest.approx(row.stderr, rel=1e-3)
            assert own_row["unit"] == "fraction"

    assert scan(study).num_done == 0
    Path(mine).write_text(EXAMPLE.read_text().replace("clamp_min(0)", "clamp_min(1)"))
    changed = scan_study(checkpoints=steps, measures=("gini",), own_measures=own)
    with pytest.raises(ResultsError, match="measure 'spread' as declared in sha256.*another name"):
        prepare_scan(changed)
    prepare_scan(scan_study(checkpoints=steps, measures=("gini", "rank_me")))

    unregister("spread")  # a report is read where nobody knows it
    page = tmp_path / "report.html"
    build_report([study.output], page)
    words = page.read_text()
    assert "Spread of memories over tokens" in words
    assert "spread of memories over tokens (fraction)" in words
