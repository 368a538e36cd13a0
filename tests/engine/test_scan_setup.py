"""What a scan finds out before Ray starts."""

from __future__ import annotations

import json
import shutil

import pytest

from ke_ray.engine.scan_setup import prepare_scan
from ke_ray.errors import DataError


@pytest.mark.parametrize(
    ("stored", "scored", "item_bytes"),
    [("float32", "float32", 4), ("bfloat16", "float32", 4), ("float32", "bfloat16", 2)],
)
def test_memory_is_counted_in_the_dtype_that_is_scored(
    scan_study, series, tmp_path, stored, scored, item_bytes
):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "stored" / "step1"
    model = AutoModelForCausalLM.from_pretrained(series / "step10", dtype=getattr(torch, stored))
    model.save_pretrained(folder)
    setup = prepare_scan(scan_study(checkpoints={"spec": str(folder)}, dtype=scored))
    # What else is in the folder counts with the weights: a few hundred bytes of configuration.
    assert setup.model_bytes == pytest.approx(model.num_parameters() * item_bytes, rel=0.05)


def test_every_series_must_be_able_to_read_the_same_token_ids(scan_study, series, tmp_path, caplog):
    for name, change in (("small", {}), ("deep", {"num_hidden_layers": 3, "vocab_size": 130})):
        folder = tmp_path / "mixed" / name / "step1"
        shutil.copytree(series / ("step10" if name == "small" else "step20"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    study = scan_study(checkpoints={"spec": str(tmp_path / "mixed" / "*" / "*")})
    assert not prepare_scan(study).steps_rise
    assert "2 architectures or sizes" in caplog.text
    assert "has a vocabulary of 128" in caplog.text or "one of 128" in caplog.text
    short = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 8}
    (folder / "config.json").write_text(json.dumps(short))
    with pytest.raises(DataError, match="has 8 positions"):
        prepare_scan(study)
