"""The check on a GPU runs to its end on a CPU, on an image that has neither Ray nor MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_leaves_one_json_and_one_table_without_ray(tmp_path: Path) -> None:
    for name in ("ray", "mlflow"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text("raise ImportError(__name__)")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--tiny", "--out", out],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "absent"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "gpu_check.json").read_text())
    values = {row["check"]: row["value"] for row in result["rows"]}
    ran = values.pop("tests marked gpu")
    assert "passed" in ran or "skipped" in ran
    assert {"ke_share_of_peak", "with_attention_over_ke", "loading hidden"} <= set(values)
    # Random weights of the tiny shape: rounding, not another result.
    assert 0 < abs(values["bfloat16 − float32, nats in all"]) < 0.01
    assert all(isinstance(value, float) for value in values.values())
    assert (out / "gpu_check.md").read_text().count("\n|") == len(result["rows"]) + 2
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.md"]
