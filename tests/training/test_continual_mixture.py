"""Continual learning from a mixture of experts, resuscitated at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_studies import tiny_continual

from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.models.loading import load_config, load_model
from ke_ray.models.saving import save_model
from ke_ray.training.continual import run_continual
from ke_ray.training.inputs import load_inputs, read_start
from ke_ray.training.runs import list_runs
from ke_ray.training.snapshot import coefficient_sums, take_snapshot


@pytest.fixture
def mixture(series: Path, tmp_path: Path, tiny_decoder) -> Path:
    """A random OLMoE with the series' vocabulary, as a checkpoint of step 10."""
    dense = series / "checkpoints" / "step10"
    config = load_config(dense)
    model = tiny_decoder(
        "olmoe",
        vocab_size=config.vocab_size,
        max_position_embeddings=320,
        eos_token_id=config.eos_token_id,
    )
    save_model(model, tmp_path / "mixture" / "step10", tokenizer=str(dense))
    return tmp_path / "mixture"


def test_a_resuscitated_mixture_learns_and_is_measured(series, mixture, tmp_path):
    study = tiny_continual(
        tmp_path / "out",
        series,
        starts={"spec": str(mixture), "steps": None},
        resuscitation={"ratio": 0.5, "factor": 2.0},
        downstream=None,
        dynamics=None,
    )
    (spec,) = list_runs(study)
    row = run_continual(study, spec)
    assert row["status"] == "ok"
    start, final = load_model(mixture / "step10"), load_model(row["final_checkpoint"])
    assert weights_sha256(row["final_checkpoint"]) == tensors_sha256(final.state_dict())
    questions = load_inputs(study, read_start(study, spec.ref, spec.ref.location), 0).questions
    after = take_snapshot(final, study, questions)
    before = take_snapshot(start, study, questions)
    assert row["knowledge_entropy_after_nats"] == pytest.approx(after.entropy_nats, abs=1e-6)
    assert row["knowledge_entropy_original_nats"] == pytest.approx(before.entropy_nats, abs=1e-6)
    assert row["probe_logprob_after"] == pytest.approx(after.knowledge, abs=1e-6)
    assert row["knowledge_entropy_before_nats"] != row["knowledge_entropy_original_nats"]
    assert row["acquisition"] > 0  # six steps on text like the facts'
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        tensors = [m.state_dict()[f"model.layers.1.mlp.{name}"] for m in (start, final)]
        assert not torch.equal(*tensors), name
    load = coefficient_sums(final, questions.entropy, 4).mean("expert_load")
    torch.testing.assert_close(load.sum(dim=1), torch.full((2,), 2.0, dtype=torch.float64))
