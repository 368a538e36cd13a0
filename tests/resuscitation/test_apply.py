from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import TINY

from ke_ray.core.resuscitation import predicted_entropy_nats
from ke_ray.errors import UnsupportedArchitectureError, UserError
from ke_ray.models.layout import describe
from ke_ray.models.scoring import score_instances, score_model
from ke_ray.resuscitation.apply import (
    apply_attention_temperature,
    apply_multipliers,
    scale_memories,
    up_row_norms,
)

ALL = list(TINY)
WITH_ALIBI = ("bloom", "mpt")
TEMPERED = [name for name in ALL if name not in (*WITH_ALIBI, "nanochat")]
IDS = torch.randint(3, 97, (6, 11), generator=torch.Generator().manual_seed(0))


def coefficients(model):
    return score_instances(model, IDS, measures=["knowledge_entropy"], num_instances=6).mean(
        "coefficients"
    )


def first_up_output(model):
    layout, seen = describe(model)[0], []
    hook = layout.up.register_forward_hook(lambda _m, _a, output: seen.append(output.detach()))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    return seen[0][..., 48:] if layout.fused == "gate_up" else seen[0]


@pytest.mark.parametrize("model_type", ALL)
def test_selected_memories_of_the_first_layer_get_factor_times_the_mean(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    before, up_before = coefficients(model), first_up_output(model)
    gate_before = [
        None if layout.gate is None or layout.fused else layout.gate.weight.detach().clone()
        for layout in describe(model)
    ]
    rows = scale_memories(model, before, ratio=0.5, factor=2.0)
    after, up_after = coefficients(model), first_up_output(model)
    first = describe(model)[0]
    rows, before, after = (table[0, : first.d_mlp] for table in (rows, before, after))
    selected = rows != 1
    half = first.d_mlp // 2
    assert int(selected.sum()) == half
    if not first.gated:  # exact before the activation, whatever it is
        torch.testing.assert_close(up_after.double(), up_before * rows, rtol=2e-5, atol=2e-5)
        assert float(after[selected].sum()) > 1.5 * float(before[selected].sum())
    else:
        torch.testing.assert_close(
            after[selected],
            (2.0 * before.mean()).expand(half),
            rtol=1e-5,
            atol=0,
        )
    torch.testing.assert_close(after[~selected], before[~selected], rtol=1e-6, atol=0)
    for layout, gate in zip(describe(model), gate_before, strict=True):
        assert gate is None or torch.equal(layout.gate.weight, gate)


def test_prediction_equals_measurement_in_the_first_layer(tiny_decoder):
    model = tiny_decoder("llama")
    before = coefficients(model)
    rows = scale_memories(model, before, ratio=0.25, factor=1.0)
    measured = score_model(model, IDS).row("knowledge_entropy", 0).value
    assert measured == pytest.approx(float(predicted_entropy_nats(before, rows)[0]), abs=1e-6)


@pytest.mark.parametrize("control", ["random", "matched_norm"])
def test_controls_scale_as_much(tiny_decoder, control):
    model, changed = tiny_decoder("olmo"), tiny_decoder("olmo")
    before = coefficients(model)
    scale_memories(model, before, ratio=0.5, factor=2.0)
    scale_memories(changed, before, ratio=0.5, factor=2.0, control=control, seed=3)
    if control == "matched_norm":
        for treated, matched in zip(up_row_norms(model), up_row_norms(changed), strict=True):
            assert float(treated.norm()) == pytest.approx(float(matched.norm()), rel=1e-6)
        torch.testing.assert_close(
            score_model(changed, IDS).row("knowledge_entropy", 0).value,
            score_model(tiny_decoder("olmo"), IDS).row("knowledge_entropy", 0).value,
        )
    else:
        moved = (up_row_norms(changed) / up_row_norms(tiny_decoder("olmo")) - 1).abs() > 1e-6
        assert moved.sum(dim=1).tolist() == [24, 24]


def divide_queries(model_type, attention, temperature):
    """Divide what becomes the scores, in the module's own terms."""
    if model_type in ("gpt_neo", "gptj"):
        attention.q_proj.register_forward_hook(lambda _m, _a, output: output / temperature)
    elif model_type == "falcon":  # rows: for each of two keys, two queries, the key, its value

        def divided(_module, _inputs, output):
            parts = output.clone().view(*output.shape[:2], 2, 4, 8)
            parts[..., :2, :] /= temperature
            return parts.flatten(2)

        attention.query_key_value.register_forward_hook(divided)
    else:
        attention.scaling /= temperature


@pytest.mark.parametrize("model_type", TEMPERED)
def test_temperature_divides_the_scores(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    reference = copy.deepcopy(model)
    for layout in describe(reference):
        if layout.attention is not None:
            divide_queries(model_type, layout.attention, 1.7)
    apply_attention_temperature(model, 1.7)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
    # A tensor that merely changed everything would not undo itself.
    apply_attention_temperature(model, 1 / 1.7)
    original = tiny_decoder(model_type).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", WITH_ALIBI)
def test_no_weights_hold_the_temperature_of_scores_with_alibi(tiny_decoder, model_type):
    with pytest.raises(UnsupportedArchitectureError, match="ALiBi"):
        apply_attention_temperature(tiny_decoder(model_type), 2.0)


@pytest.mark.parametrize("control", [None, "random", "matched_norm"])
def test_narrow_layers_choose_among_their_own_memories(tiny_decoder, control):
    model = tiny_decoder("gemma3n_text")
    before = coefficients(model)
    assert before.isnan().sum(dim=1).tolist() == [16, 0, 16]
    rows = scale_memories(model, before, ratio=0.5, factor=2.0, control=control)
    assert bool((rows[before.isnan()] == 1).all())
    changed = (rows != 1).sum(dim=1).tolist()
    assert changed == ([48, 64, 48] if control == "matched_norm" else [24, 32, 24])
    measured = score_model(model, IDS).row("knowledge_entropy", 0).value
    predicted = float(predicted_entropy_nats(before, rows)[0])
    assert measured == pytest.approx(predicted, abs=1e-5)


def test_temperature_raises_attention_entropy_and_survives_saving(tiny_decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_decoder("qwen3")
    before = score_model(model, IDS, measures=["attention_entropy"]).row("attention_entropy").value
    apply_attention_temperature(model, 3.0)
    after = score_model(model, IDS, measures=["attention_entropy"]).row("attention_entropy").value
    assert after > before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = score_model(loaded, IDS, measures=["attention_entropy"]).row("attention_entropy").value
    assert again == pytest.approx(after, abs=1e-6)


def test_bad_requests_change_nothing(tiny_decoder):
    model = tiny_decoder("olmo")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = coefficients(model)
    with pytest.raises(UserError, match=r"\(2, 47\).*2 layers of 48 memories"):
        scale_memories(model, good[:, 1:], ratio=0.5, factor=2.0)
    with pytest.raises(UserError, match="ratio is 0"):
        scale_memories(model, good, ratio=0.0, factor=2.0)
    with pytest.raises(UserError, match="infinite or NaN"):
        apply_multipliers(model, torch.full((2, 48), torch.inf))
    with pytest.raises(UserError, match="shape"):
        apply_multipliers(model, torch.ones(3, 48))
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            apply_attention_temperature(model, temperature)
    model.config.clip_qkv = 8.0
    with pytest.raises(UnsupportedArchitectureError, match="clips its queries"):
        apply_attention_temperature(model, 2.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(UnsupportedArchitectureError, match="normalises its queries without"):
        apply_attention_temperature(tiny_decoder("nanochat"), 2.0)


def test_bfloat16_weights_keep_their_dtype(tiny_decoder):
    model = tiny_decoder("olmo").bfloat16()
    exact = describe(model)[0].up_weight().detach().double() * 3
    apply_multipliers(model, torch.full((2, 48), 3.0, dtype=torch.float64))
    assert describe(model)[0].up_weight().dtype == torch.bfloat16
    assert torch.equal(describe(model)[0].up_weight(), exact.bfloat16())


@pytest.mark.parametrize("name", ["tiny-seed0", "tiny-seed1"])
def test_golden_weights_and_coefficients_after_resuscitation(reference_data, name):
    from transformers import OlmoForCausalLM

    folder = reference_data / "golden" / name
    golden = load_file(folder / "golden.safetensors")
    values = json.loads((folder / "golden.json").read_text())
    model = OlmoForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    untouched = {k: v.clone() for k, v in model.state_dict().items() if "up_proj" not in k}
    ids = load_file(folder / "inputs.safetensors")["input_ids"]
    scale_memories(model, golden["avg_coefficients"], ratio=0.5, factor=2.0)
    key = "resuscitated.p0.5_q2.0."
    for i, layer in enumerate(model.model.layers):
        fused = torch.cat([layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight]).detach()
        torch.testing.assert_close(
            fused, golden[f"{key}transformer.blocks.{i}.ff_proj.weight"], rtol=1e-5, atol=0
        )
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in untouched.items())
    sums = score_instances(model, ids, measures=["knowledge_entropy"], num_instances=16)
    torch.testing.assert_close(
        sums.mean("coefficients").float(), golden[key + "avg_coefficients"], rtol=2e-5, atol=0
    )
    measured = score_model(model, ids).row("knowledge_entropy").value
    official = values["resuscitated_p0.5_q2.0_official"]["knowledge_entropy"]
    assert measured == pytest.approx(official, abs=2e-5)
