"""What a scan finds out before Ray starts."""

from __future__ import annotations

import pytest

from ke_ray.planning.scan import prepare_scan


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
