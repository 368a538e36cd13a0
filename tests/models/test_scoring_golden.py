"""The golden models: values of the authors' scripts and of a float64 brute force."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ke_ray.models.attention import measure_attention
from ke_ray.models.layout import describe
from ke_ray.models.scoring import compact, score_instances, score_model

ENTROPIES = (
    "knowledge_entropy",
    "knowledge_entropy_relu",
    "attention_entropy",
    "next_token_entropy",
)


@pytest.fixture(scope="module", params=["tiny-seed0", "tiny-seed1"])
def golden(request, reference_data):
    from transformers import OlmoForCausalLM

    folder = reference_data / "golden" / request.param
    model = OlmoForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    values = json.loads((folder / "golden.json").read_text())
    tensors = load_file(folder / "golden.safetensors")
    return model, load_file(folder / "inputs.safetensors"), values, tensors


@pytest.mark.parametrize("batch_size", [1, 5])
def test_plain_inputs(golden, batch_size):
    model, inputs, values, _ = golden
    got = score_model(model, inputs["input_ids"], measures=ENTROPIES, batch_size=batch_size)
    for measure in ENTROPIES[:3]:
        expected = values["float64"][measure]
        for layer, value in enumerate(expected["per_layer"]):
            assert got.row(measure, layer).value == pytest.approx(value, abs=1e-5)
        assert got.row(measure).value == pytest.approx(expected["sum"], abs=2e-5)
    expected = values["float64"]["next_token_entropy"]
    assert got.row("next_token_entropy").value == pytest.approx(expected, abs=1e-5)
    official = values["official"]["knowledge_entropy"]
    assert got.row("knowledge_entropy").value == pytest.approx(official, abs=1e-5)


def test_padded_inputs_leave_padding_out(golden):
    model, inputs, values, tensors = golden
    ids, mask = inputs["padded_input_ids"], inputs["padded_attention_mask"]
    got = score_model(model, ids, mask, measures=ENTROPIES, batch_size=4)
    assert got.num_tokens == int(mask.sum())
    for measure in ENTROPIES:
        expected = values["float64_padded"][measure + "_masked_instance_mean"]
        if measure == "next_token_entropy":
            assert got.row(measure).value == pytest.approx(expected, abs=1e-5)
            continue
        for layer, value in enumerate(expected["per_layer"]):
            assert got.row(measure, layer).value == pytest.approx(value, abs=1e-5)
    ids, lengths = compact(ids, mask)
    sums = score_instances(
        model, ids, lengths, measures=["knowledge_entropy"], num_instances=16, batch_size=4
    )
    torch.testing.assert_close(
        sums.mean("coefficients"),
        tensors["padded.avg_coefficients_masked_instance_mean_float64"],
        rtol=1e-5,
        atol=0,
    )


def test_mean_coefficients(golden):
    model, inputs, _, tensors = golden
    sums = score_instances(
        model,
        inputs["input_ids"],
        measures=["knowledge_entropy", "knowledge_entropy_relu"],
        num_instances=16,
        batch_size=2,
    )
    for table, name in (
        ("coefficients", "avg_coefficients_float64"),
        ("coefficients_relu", "avg_coefficients_relu_float64"),
    ):
        torch.testing.assert_close(sums.mean(table), tensors[name], rtol=1e-5, atol=1e-8)


def test_attention_entropy_of_every_head(golden):
    model, inputs, values, _ = golden
    heads: dict[int, torch.Tensor] = {}
    with measure_attention(model, describe(model), heads.__setitem__), torch.no_grad():
        model(inputs["input_ids"])
    for layer, expected in enumerate(values["float64"]["attention_entropy_per_layer_head"]):
        got = heads[layer].double().mean(dim=(0, 2))
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
        )


def test_bfloat16_is_close_to_float32(golden):
    from copy import deepcopy

    model, inputs, _, _ = golden
    exact = score_model(model, inputs["input_ids"], measures=ENTROPIES)
    rough = score_model(deepcopy(model).bfloat16(), inputs["input_ids"], measures=ENTROPIES)
    limits = {"knowledge_entropy": 2e-4, "knowledge_entropy_relu": 2e-4, "attention_entropy": 1e-3}
    for measure, limit in limits.items():
        for layer in range(2):
            difference = rough.row(measure, layer).value - exact.row(measure, layer).value
            assert abs(difference) < limit, (measure, layer)
