"""The naive peer of benchmarks/scoring.py gives the published numbers, so it is a fair peer."""

from __future__ import annotations

import json

import interleaved
import pytest
import torch
from naive_scoring import NaiveScorer
from safetensors.torch import load_file

from ke_ray.models.scoring import score_model


@pytest.mark.parametrize("name", ["tiny-seed0", "tiny-seed1"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_naive_peer_equals_the_published_script(reference_data, name, batch_size):
    from transformers import OlmoForCausalLM

    folder = reference_data / "golden" / name
    model = OlmoForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    ids = load_file(folder / "inputs.safetensors")["input_ids"]
    golden = load_file(folder / "golden.safetensors")
    official = json.loads((folder / "golden.json").read_text())["official"]["knowledge_entropy"]
    naive = NaiveScorer(model)
    torch.testing.assert_close(
        naive.mean_coefficients(ids, batch_size),
        golden["official_avg_act_abs"],
        rtol=1e-5,
        atol=0,
    )
    assert naive.knowledge_entropy(ids, batch_size) == pytest.approx(official, abs=2e-5)
    naive.close()
    ours = score_model(model, ids, batch_size=batch_size).row("knowledge_entropy").value
    assert ours == pytest.approx(official, abs=2e-5)


def test_rounds_are_interleaved_and_ratios_taken_within_a_round():
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved.run_rounds(contenders, 2)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    found = interleaved.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0], "<= 3")
    assert (found.median, found.rounds) == (3.0, 3)
    assert found.low == pytest.approx(2.5)
    assert found.high == pytest.approx(3.5)
