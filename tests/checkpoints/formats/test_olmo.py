"""OLMo's own layout: the goldens, round trips, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.formats.olmo import fuse, native_shapes, split
from ke_ray.checkpoints.formats.olmo_config import (
    NativeConfig,
    parse_native_config,
    read_native_config,
)
from ke_ray.errors import CheckpointError, KeRayError, UnsupportedArchitectureError
from ke_ray.models.loading import load_config, load_model
from ke_ray.models.saving import save_model

TINY = """\
model:
  d_model: 16
  n_heads: 4
  n_layers: 2
  mlp_ratio: 4
  weight_tying: true
  rope: true
  include_bias: false
  layer_norm_with_affine: false
  max_sequence_length: 32
  vocab_size: 50
  embedding_size: 64
  eos_token_id: 0
  pad_token_id: 1
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_golden_native_folder_is_the_same_model_as_its_hf_folder(
    reference_data: Path, seed: int
) -> None:
    golden = reference_data / "golden" / f"tiny-seed{seed}"
    ids = load_file(golden / "inputs.safetensors")["input_ids"][:4]
    native, hf = load_model(golden / "olmo"), load_model(golden / "hf")
    assert torch.equal(native(ids).logits, hf(ids).logits)
    assert weights_sha256(golden / "olmo") == weights_sha256(golden / "hf")
    assert load_config(golden / "olmo").eos_token_id == 0


def test_published_configurations_are_read(reference_data: Path) -> None:
    lists = reference_data / "data" / "olmo_checkpoints"
    config = read_native_config(lists / "OLMo-1B.yaml")
    assert (config.d_model, config.n_layers, config.d_mlp) == (2048, 16, 8192)
    assert (config.vocab_size, config.eos_token_id, config.tied) == (50_304, 50_279, True)
    with pytest.raises(UnsupportedArchitectureError, match="resuscitation="):
        read_native_config(next((lists / "configs" / "resuscitation").glob("*.yaml")))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("model_type", ["olmo", "olmo2"])
def test_round_trip_through_the_native_layout(
    tmp_path: Path, tiny_decoder, model_type: str, kv_heads: int, tied: bool
) -> None:
    model = tiny_decoder(
        model_type, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=5000.0
    )
    save_model(model, tmp_path / "native", layout="native")
    save_model(model, tmp_path / "hf")
    again = load_model(tmp_path / "native")
    ids = torch.arange(2, 50).reshape(2, 24)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert weights_sha256(tmp_path / "native") == weights_sha256(tmp_path / "hf")
    names = set(load_file(tmp_path / "native" / "model.safetensors"))
    assert ("transformer.ff_out.weight" in names) is not tied
    assert ("transformer.ln_f.weight" in names) is (model_type == "olmo2")
    assert read_native_config(tmp_path / "native" / "config.yaml").n_kv_heads == kv_heads


def test_fused_tensors_are_split_by_rows() -> None:
    text = TINY.replace("n_layers: 2", "n_layers: 1\n  n_kv_heads: 2")
    config = parse_native_config(text)
    shapes = native_shapes(config)
    assert shapes["transformer.blocks.0.att_proj.weight"] == (16 + 8 + 8, 16)
    assert shapes["transformer.blocks.0.ff_proj.weight"] == (64, 16)
    tensors = {
        name: torch.arange(shape[0], dtype=torch.float32)[:, None].expand(shape).contiguous()
        for name, shape in shapes.items()
    }
    parts = split(tensors, config, origin="test")
    layer = "model.layers.0."
    first_rows = {
        name.removeprefix(layer): int(tensor[0, 0])
        for name, tensor in parts.items()
        if name.startswith(layer)
    }
    # [q; k; v] and [up; gate], counted in rows of the fused tensors.
    assert first_rows["self_attn.q_proj.weight"] == 0
    assert first_rows["self_attn.k_proj.weight"] == 16
    assert first_rows["self_attn.v_proj.weight"] == 24
    assert first_rows["mlp.up_proj.weight"] == 0
    assert first_rows["mlp.gate_proj.weight"] == 32
    back = fuse(parts, config)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_splitting_copies_nothing() -> None:
    config = parse_native_config(TINY)
    tensors = {name: torch.zeros(shape) for name, shape in native_shapes(config).items()}
    fused = tensors["transformer.blocks.0.ff_proj.weight"]
    gate = split(tensors, config, origin="test")["model.layers.0.mlp.gate_proj.weight"]
    gate[0, 0] = 7.0
    assert fused[config.d_mlp, 0] == 7.0


def test_yaml_survives_a_round_trip() -> None:
    config = parse_native_config(TINY)
    assert parse_native_config(config.to_yaml()) == config
    assert NativeConfig.from_transformers(config.to_transformers()) == config
    assert config.d_mlp == 32
    assert config.vocab_size == 64


OLMO2 = TINY.replace("  layer_norm_with_affine: false\n", "") + (
    "  norm_after: true\n  layer_norm_type: rms\n  layer_norm_with_affine: true\n"
    "  attention_layer_norm: true\n  bias_for_layer_norm: false\n  layer_norm_eps: 1e-6\n"
    "  mlp_hidden_size: 44\n"
)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    config = parse_native_config(OLMO2)
    assert config.model_type == "olmo2"
    assert config.norm_eps == 1e-6
    assert config.d_mlp == 22
    assert config.to_transformers().rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (TINY + "  alibi: true\n", "alibi"),
        (TINY.replace("include_bias: false", "include_bias: true"), "include_bias"),
        (TINY.replace("  include_bias: false\n", ""), "include_bias"),
        (TINY.replace("  rope: true\n", ""), "rope"),
        (TINY.replace("affine: false", "affine: true"), "layer_norm_with_affine"),
        (TINY + "  activation_type: gelu\n", "activation_type"),
        (TINY + "  block_type: llama\n", "block_type"),
        (TINY + "  block_group_size: 2\n", "block_group_size"),
        (TINY + "  scale_logits: true\n", "scale_logits"),
        (TINY + "  attention_layer_norm: true\n", "attention_layer_norm"),
        (TINY + "  layer_norm_eps: 1.0e-6\n", "layer_norm_eps"),
        (TINY + "  layer_norm_type: rms\n", "layer_norm_with_affine"),
        (TINY + "  embedding_layer_norm: true\n", "embedding_layer_norm"),
        (TINY + "  moe_num_experts: 64\n", "moe_num_experts"),
        (OLMO2 + "  clip_qkv: 8.0\n", "clip_qkv"),
        (OLMO2.replace("type: rms", "type: default"), "layer_norm_type"),
    ],
)
def test_what_transformers_cannot_reproduce_is_refused_by_name(text: str, key: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"{key}="):
        parse_native_config(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no 'model' section"),
        ("model: 3\n", "no 'model' section"),
        ("model:\n  d_model: [\n", "not valid YAML"),
        (TINY.replace("d_model: 16", "d_model: many"), "d_model='many'"),
        (TINY.replace("d_model: 16", "d_model: 18"), "even multiple"),
        (TINY.replace("n_layers: 2", "n_layers: 0"), "n_layers=0"),
        (TINY.replace("mlp_ratio: 4", "mlp_hidden_size: 33"), "SwiGLU needs an even one"),
        (TINY.replace("eos_token_id: 0", "eos_token_id: 64"), "eos_token_id=64"),
        (TINY.replace("embedding_size: 64", "embedding_size: 49"), "smaller than vocab_size"),
        ("model:\n  a: &x 1\n  b: *x\n", "aliases"),
        (TINY + "  n_kv_heads: 2\n  multi_query_attention: true\n", "n_kv_heads=2"),
    ],
)
def test_malformed_configurations_are_explained(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_native_config(text)


def test_many_layers_are_not_spelled_out() -> None:
    config = parse_native_config(TINY.replace("n_layers: 2", "n_layers: 65536"))
    with pytest.raises(CheckpointError, match="65,536 layers"):
        split({"transformer.wte.weight": torch.zeros(64, 16)}, config, origin="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.blocks.1.ff_out.weight"), "1 missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected"),
        (lambda t: t.update({"transformer.wte.weight": torch.zeros(63, 16)}), r"\[63, 16\]"),
    ],
)
def test_wrong_tensors_are_named(change, message: str) -> None:
    config = parse_native_config(TINY)
    tensors = {name: torch.zeros(shape) for name, shape in native_shapes(config).items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        split(tensors, config, origin="test")


def test_only_olmo_models_fit_the_native_layout(tmp_path: Path, tiny_decoder) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'llama'"):
        save_model(tiny_decoder("llama"), tmp_path / "x", layout="native")
    assert list(tmp_path.iterdir()) == []


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.just("[1, 2]"),
    st.just("{a: 1}"),
    st.just("&a [*a]"),
    st.just("!!python/object:os.system x"),
)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from([TINY, OLMO2]),
    edits=st.lists(st.tuples(st.integers(0, 18), VALUES), min_size=1, max_size=3),
)
def test_any_value_gives_a_configuration_or_one_clear_error(base: str, edits) -> None:
    lines = base.splitlines()
    for index, value in edits:
        line = 1 + index % (len(lines) - 1)
        lines[line] = f"{lines[line].split(':')[0]}: {value}"
    try:
        config = parse_native_config("\n".join(lines))
    except KeRayError as error:
        assert str(error)
    else:
        assert config.to_transformers().hidden_size == config.d_model


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(0, len(TINY)),
    junk=st.text(max_size=30) | st.text("[]{}:,-?&*!|>'\"%@ \n\tax0", max_size=30),
)
def test_any_text_gives_a_configuration_or_one_clear_error(cut: int, junk: str) -> None:
    try:
        parse_native_config(TINY[:cut] + junk + TINY[cut:])
    except KeRayError as error:
        assert str(error)


@pytest.mark.parametrize("prefix", ["", "model:\n  "])
@pytest.mark.parametrize(
    "bomb", ["[" * 60_000, "{a: " * 9000, "- " * 9000, "? " * 9000, "a: &a b\n" * 5000, "x" * 10**7]
)
def test_texts_that_grow_inside_a_parser_end_in_one_error(prefix: str, bomb: str) -> None:
    with pytest.raises(KeRayError):
        parse_native_config(prefix + bomb)
