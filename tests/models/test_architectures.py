from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_decoders import TINY_MIXTURES
from torch import nn

from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.architectures import check_config, supported_model_types
from ke_ray.models.layout import describe

NAMED = [
    *("olmo", "olmo2", "olmo3", "llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "gpt2"),
    *("apertus", "smollm3", "stablelm", "granite", "cohere", "cohere2", "exaone4", "helium"),
    *("arcee", "nemotron", "starcoder2", "gpt_neo", "gptj", "falcon", "opt", "bloom", "mpt"),
    *("qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "gemma3n_text"),
    *("olmo_hybrid", "nemotron_h", "nanochat", "openelm"),
]
UNGATED = {
    *("phi", "gpt_neox", "gpt2", "apertus", "arcee", "nemotron", "starcoder2", "gpt_neo"),
    *("gptj", "falcon", "opt", "bloom", "mpt", "nemotron_h", "nanochat"),
}


def test_the_table_names_what_the_issue_asks_for():
    assert sorted([*NAMED, *TINY_MIXTURES]) == list(supported_model_types())


@pytest.mark.parametrize("model_type", NAMED)
def test_layout_is_in_forward_order_and_has_the_config_sizes(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    layouts = describe(model)
    widths = {"bloom": 128, "mpt": 128}
    expected = [widths.get(model_type, 48)] * model.config.num_hidden_layers
    if model_type == "gemma3n_text":
        expected = [48, 64, 48]
    elif model_type == "openelm":
        expected = [48, 16, 64]
    elif model_type == "nemotron_h":
        expected = [48, 0, 0, 48]
    assert [layout.d_mlp for layout in layouts] == expected
    order: list[int] = []
    hooks = [
        layout.second_projection.register_forward_hook(lambda *_a, i=i: order.append(i))
        for i, layout in enumerate(layouts)
        if layout.second_projection is not None
    ]
    model(torch.tensor([[3, 4, 5]]))
    assert order == [i for i, width in enumerate(expected) if width]
    for hook in hooks:
        hook.remove()
    assert layouts[0].gated is (model_type not in UNGATED)


@pytest.mark.parametrize("model_type", NAMED)
def test_up_weight_is_a_view_of_the_memory_keys(tiny_decoder, model_type):
    model = tiny_decoder(model_type)
    layout = describe(model)[0]
    keys = layout.up_weight()
    assert tuple(keys.shape) == (layout.d_mlp, 32)
    before = layout.up.weight.detach().clone()
    shift = torch.linspace(1.0, 2.0, 32)
    with torch.no_grad():
        keys[7] += shift
    changed = (layout.up.weight.detach() - before).abs() > 0.5
    assert int(changed.sum()) == 32
    # What feeds the second projection changes at memory 7 only, so row 7 really is memory 7.
    seen: list[torch.Tensor] = []
    hook = layout.second_projection.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    ids = torch.tensor([[3, 4, 5]])
    model(ids)
    with torch.no_grad():
        keys[7] -= shift
    model(ids)
    hook.remove()
    moved = (seen[0] - seen[1]).abs().flatten(0, -2).amax(dim=0) > 1e-3
    assert moved.nonzero()[:, 0].tolist() == [7]


@pytest.mark.parametrize("model_type", ["xglm", "codegen", "persimmon"])
def test_unknown_architectures_are_refused_and_the_known_ones_named(model_type):
    from transformers import AutoConfig

    with pytest.raises(UnsupportedArchitectureError, match=r"not known.*gpt_neox.*olmo3"):
        check_config(AutoConfig.for_model(model_type))


def test_a_near_miss_gets_a_hint():
    with pytest.raises(UnsupportedArchitectureError, match="Did you mean 'gemma3_text'"):
        check_config(SimpleNamespace(model_type="gemma3text"))
    with pytest.raises(UnsupportedArchitectureError, match="model type ''"):
        check_config(SimpleNamespace())


def test_bidirectional_attention_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="both directions"):
        check_config(SimpleNamespace(model_type="gemma2", use_bidirectional_attention=True))


def test_a_model_not_built_like_its_type_is_refused(tiny_decoder):
    model = tiny_decoder("llama")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedArchitectureError, match="not built like it"):
        describe(model)


def test_a_bare_body_is_described_too(tiny_decoder):
    body = tiny_decoder("gpt2").base_model
    assert len(describe(body)) == 2


def test_a_hybrid_with_experts_is_refused_and_one_without_is_not():
    from transformers import AutoConfig

    sizes = {"n_routed_experts": 8}
    check_config(AutoConfig.for_model("nemotron_h", layers_block_type=["mlp"], **sizes))
    check_config(AutoConfig.for_model("qwen3_next", num_experts=0))
    for config in (
        AutoConfig.for_model("nemotron_h", layers_block_type=["mlp", "moe"], **sizes),
        AutoConfig.for_model("qwen3_next"),
    ):
        with pytest.raises(UnsupportedArchitectureError, match="mixture of experts"):
            check_config(config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "state-space"),
        ("rwkv", "recurrent"),
        ("jamba", "hybrid"),
        ("bert", "encoder"),
        ("t5", "encoder-decoder"),
        ("gemma3", "modalities"),
        ("lfm2_vl", "modalities"),
    ],
)
def test_families_that_cannot_be_measured_are_told_why(model_type, reason):
    with pytest.raises(UnsupportedArchitectureError, match=reason) as raised:
        check_config(SimpleNamespace(model_type=model_type))
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize("model_type", ["xglm", "codegen", "persimmon", "gemini"])
def test_names_that_are_only_a_little_alike_get_no_hint(model_type):
    with pytest.raises(UnsupportedArchitectureError, match="not known") as raised:
        check_config(SimpleNamespace(model_type=model_type))
    assert "Did you mean" not in str(raised.value)
