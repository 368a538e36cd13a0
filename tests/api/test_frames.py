"""Scores of a model in hand, and of a scan, as frames with units."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ke_ray
from ke_ray.errors import ConfigError
from ke_ray.models.loading import load_model
from ke_ray.models.scoring import score_model


def test_a_model_in_hand(series: Path, token_ids: Path) -> None:
    model = load_model(series / "step10")
    ids = np.load(token_ids)[:8].astype(np.int64)
    frame = ke_ray.score_model(model, ids, measures=["knowledge_entropy", "gini"])
    evaluation = score_model(model, torch.from_numpy(ids), measures=["knowledge_entropy", "gini"])
    total = frame[(frame.measure == "knowledge_entropy") & frame.layer.isna()].iloc[0]
    assert total.value == evaluation.row("knowledge_entropy").value
    assert (total.stderr, total.unit) == (evaluation.row("knowledge_entropy").stderr, "nats")
    assert len(frame) == len(evaluation.rows) == 6
    assert frame.attrs == {"num_instances": 8, "num_tokens": 8 * 24}


@pytest.mark.ray
def test_a_scan_is_the_folder_it_writes(
    ray_cluster: None, series: Path, token_ids: Path, tmp_path: Path
) -> None:
    keys = {
        "num_instances": 16,
        "sequence_length": 24,
        "measures": ["knowledge_entropy"],
        "mlflow": {"enabled": False},
        "output": str(tmp_path / "out"),
        "checkpoints.every": 3,
    }
    frame = ke_ray.scan(str(series), {"random": str(token_ids)}, **keys)
    assert sorted(set(frame.step)) == [10, 40]
    assert frame.attrs["units"]["tokens"] == "tokens"
    stored = pd.read_parquet(tmp_path / "out" / "entropy.parquet")
    pd.testing.assert_frame_equal(frame, stored, check_dtype=False)
    assert (tmp_path / "out" / "report.html").is_file()
    ids = np.load(token_ids)[:70].astype(np.int64)
    whole = ke_ray.scan(
        str(series),
        {"random": str(token_ids)},
        **keys | {"num_instances": 70, "output": str(tmp_path / "whole")},
    )
    direct = ke_ray.score_model(load_model(series / "step40"), ids)
    one = whole[(whole.step == 40) & whole.layer.isna()].iloc[0]
    other = direct[direct.layer.isna()].iloc[0]
    assert one.value == pytest.approx(other.value, rel=1e-6)
    assert one.stderr == pytest.approx(other.stderr, rel=1e-4)


def test_a_study_that_is_wrong_says_what(series: Path) -> None:
    with pytest.raises(ConfigError, match="ke_ray.scan: .*num_instance"):
        ke_ray.scan(str(series), {"d": "x.jsonl"}, num_instance=3, output="out")


def test_the_package_stays_light_until_it_is_used() -> None:
    code = (
        "import sys, ke_ray\n"
        "assert {'scan', 'series', 'score_model'} <= set(dir(ke_ray))\n"
        "assert not {'torch', 'pandas', 'pydantic', 'ray'} & set(sys.modules)\n"
        "ke_ray.series\n"
        "assert not {'torch', 'ray'} & set(sys.modules)\n"
        "try:\n    ke_ray.serie\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'ke_ray' has no attribute 'serie'\n"
