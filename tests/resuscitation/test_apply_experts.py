"""Resuscitation of mixtures of experts: rows of every expert, and what is saved of them."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_decoders import TINY_MIXTURES

from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.core.resuscitation import predicted_entropy_nats
from ke_ray.models.layout import describe
from ke_ray.models.loading import load_model
from ke_ray.models.saving import save_model
from ke_ray.models.scoring import score_instances, score_model
from ke_ray.resuscitation.apply import apply_attention_temperature, scale_memories, up_row_norms

MIXTURES = tuple(TINY_MIXTURES)
IDS = torch.randint(3, 97, (6, 11), generator=torch.Generator().manual_seed(0))


def coefficients(model):
    sums = score_instances(model, IDS, measures="knowledge_entropy", num_instances=6)
    return sums.mean("coefficients")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_selected_memories_of_the_first_layer_get_factor_times_the_mean(tiny_decoder, model_type):
    # gpt-oss clamps: of what is raised above its limit the law does not hold.
    unlimited = {"swiglu_limit": 1e6} if model_type == "gpt_oss" else {}
    model = tiny_decoder(model_type, **unlimited)
    width = describe(model)[0].d_mlp
    before = coefficients(model)
    untouched = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "down_proj" in name or "gate." in name or "router" in name
    }
    rows = scale_memories(model, before, ratio=0.5, factor=2.0)
    after = coefficients(model)
    raised = (rows[0] != 1) & (before[0] > 0)
    assert int((rows[0] != 1).sum()) == (width - 1) // 2 + 1
    assert torch.all(rows[0, width:] == 1)
    expected = (2.0 * before[0, :width].mean()).expand(int(raised.sum()))
    torch.testing.assert_close(after[0, raised], expected, rtol=1e-4, atol=0)
    kept = ~raised[:width]
    torch.testing.assert_close(after[0, :width][kept], before[0, :width][kept], rtol=1e-5, atol=0)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())


def test_prediction_equals_measurement_in_the_first_layer(tiny_decoder):
    model = tiny_decoder("deepseek_v2")  # the second layer, not the first, has experts
    before = coefficients(model)
    rows = scale_memories(model, before, ratio=0.25, factor=1.0)
    measured = score_model(model, IDS).row("knowledge_entropy", 0).value
    assert measured == pytest.approx(float(predicted_entropy_nats(before, rows)[0]), abs=1e-6)


def test_matched_norm_has_the_norm_of_all_experts_together(tiny_decoder):
    model, changed = tiny_decoder("qwen2_moe"), tiny_decoder("qwen2_moe")
    before = coefficients(model)
    scale_memories(model, before, ratio=0.5, factor=2.0)
    scale_memories(changed, before, ratio=0.5, factor=2.0, control="matched_norm")
    for treated, matched in zip(up_row_norms(model), up_row_norms(changed), strict=True):
        assert float(treated.norm()) == pytest.approx(float(matched.norm()), rel=1e-6)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_resuscitated_mixture_is_loaded_as_it_was_saved(tiny_decoder, model_type, tmp_path):
    model = tiny_decoder(model_type)
    scale_memories(model, coefficients(model), ratio=0.5, factor=2.0)
    save_model(model, tmp_path / "revived")
    loaded = load_model(tmp_path / "revived")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(coefficients(loaded).nan_to_num(), coefficients(model).nan_to_num())
    save_model(loaded, tmp_path / "again")
    assert weights_sha256(tmp_path / "again") == weights_sha256(tmp_path / "revived")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_temperature_divides_the_scores_of_a_mixture(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    reference = copy.deepcopy(model)
    for layout in describe(reference):
        layout.attention.scaling /= 1.7
        if model_type == "gpt_oss":  # its sinks are logits of the same softmax
            layout.attention.sinks.data /= 1.7
    apply_attention_temperature(model, 1.7)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
