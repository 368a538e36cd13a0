"""Whole checkpoints load exactly; broken ones give one clear error and run no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import TINY

from ke_ray.checkpoints.reference import CheckpointRef, find_tokenizer
from ke_ray.errors import CheckpointError, UnsupportedArchitectureError
from ke_ray.models.configuration import read_config, read_outline
from ke_ray.models.loading import load_config, load_model, move
from ke_ray.models.saving import save_model

FAMILIES = list(TINY)
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def folder(tmp_path: Path, tiny_decoder) -> Path:
    """A whole tiny checkpoint to break."""
    save_model(tiny_decoder("olmo"), tmp_path / "whole")
    return tmp_path / "whole"


def rewrite(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_loads_exactly_what_was_saved(
    tmp_path: Path, tiny_decoder, family: str
) -> None:
    model = tiny_decoder(family)
    save_model(model, tmp_path / "x")
    loaded = load_model(tmp_path / "x")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    config = load_config(tmp_path / "x")
    assert config.model_type == family
    outline = read_outline(CheckpointRef("x", str(tmp_path / "x"), "hf"))
    for name in ("vocab_size", "max_position_embeddings", "eos_token_id"):
        assert getattr(outline, name, None) == getattr(config, name, None), name


@pytest.mark.parametrize(
    "values",
    [{"vocab_size": None}, {"vocab_size": "96"}, {"eos_token_id": [0, 3]}, {"model_type": "bert"}],
)
def test_an_outline_of_an_odd_config_is_what_transformers_says(folder: Path, values: dict) -> None:
    reconfigure(folder, **values)
    ref, answers = CheckpointRef("x", str(folder), "hf"), []
    for read in (read_config, read_outline):
        try:
            found = read(ref)
            answers.append([found.vocab_size, found.eos_token_id])
        except (CheckpointError, UnsupportedArchitectureError) as error:
            answers.append(str(error))
    assert answers[0] == answers[1]


def test_the_text_decoder_of_qwen_3_5_is_read_out_of_the_whole_model(tmp_path: Path) -> None:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision |= {"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
    tokens = {"image_token_id": 90, "video_token_id": 91}
    tokens |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen3_5Config(text_config=TINY["qwen3_5_text"], vision_config=vision, **tokens)
    whole = Qwen3_5ForConditionalGeneration(config).eval()
    save_model(whole, tmp_path / "x")
    loaded = load_model(tmp_path / "x")
    assert loaded.config.model_type == "qwen3_5_text"
    assert torch.equal(loaded(IDS).logits, whole(IDS).logits)
    assert not any("visual" in name for name, _ in loaded.named_parameters())
    outline = read_outline(CheckpointRef("x", str(tmp_path / "x"), "hf"))
    assert (outline.vocab_size, outline.eos_token_id) == (97, 2)


def test_shards_load_as_one(tmp_path: Path, tiny_decoder) -> None:
    model = tiny_decoder("llama")
    model.save_pretrained(tmp_path / "x", max_shard_size="20KB")
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path / "x")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "native"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_stripped(
    tmp_path: Path, tiny_decoder, prefix: str, file: str
) -> None:
    model = tiny_decoder("olmo")
    save_model(model, tmp_path, layout="native" if file == "native" else "hf")
    path = tmp_path / "model.safetensors"
    tensors = {prefix + name: tensor for name, tensor in load_file(path).items()}
    if file == "pytorch_model.bin":
        path.unlink()
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_prefixes_inside_names_and_two_of_one_name(folder: Path, tiny_decoder) -> None:
    def wrap(tensors) -> None:  # torch.compile of each layer
        for name in [name for name in tensors if ".layers." in name]:
            head, layer, rest = name.split(".", 3)[:2], *name.split(".", 3)[2:]
            tensors[".".join([*head, layer, "_orig_mod", rest])] = tensors.pop(name)

    rewrite(folder, wrap)
    assert torch.equal(load_model(folder)(IDS).logits, tiny_decoder("olmo")(IDS).logits)
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t.update({f"_orig_mod.{name}": torch.zeros(97, 32)}))
    with pytest.raises(CheckpointError, match=f"'{name}' twice"):
        load_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_without_head_loads_as_its_body(
    tmp_path: Path, tiny_decoder, family: str
) -> None:
    model = tiny_decoder(family)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.base_model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.base_model(IDS)[0], model.base_model(IDS)[0])
    if tied:  # the head is the embedding, which is there
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    else:
        assert loaded.get_output_embeddings() is None


def test_a_lost_head_is_no_base_model(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*lm_head"):
        load_model(folder)


def test_a_base_model_cannot_be_saved_in_the_native_layout(tmp_path: Path, tiny_decoder) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="needs a language-model head"):
        save_model(tiny_decoder("olmo").base_model, tmp_path / "x", layout="native")


def test_shards_without_their_index_load_as_one(tmp_path: Path, tiny_decoder) -> None:
    model = tiny_decoder("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="tensors are missing"):
        load_model(tmp_path)


def test_a_git_lfs_pointer_is_told_apart_from_damage(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="Git LFS pointer.*git lfs pull"):
        load_model(folder)


def test_pickled_tensors_load(folder: Path, tiny_decoder) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = tiny_decoder("olmo")
    assert torch.equal(load_model(folder)(IDS).logits, model(IDS).logits)


def test_dtype_is_the_one_asked_for(folder: Path) -> None:
    assert load_model(folder).dtype == torch.float32
    half = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_rotary_tables_are_those_of_a_fresh_model(folder: Path, tiny_decoder) -> None:
    fresh = dict(tiny_decoder("olmo").named_buffers())
    for name, buffer in load_model(folder).named_buffers():
        assert torch.equal(buffer, fresh[name])


def test_old_masks_and_rotary_tables_in_the_file_are_ignored(folder: Path) -> None:
    rewrite(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    load_model(folder)


def test_tokenizer_is_found_beside_or_above(folder: Path) -> None:
    assert find_tokenizer(folder) is None
    (folder.parent / "tokenizer.json").write_text("{}")
    assert find_tokenizer(folder) == folder.parent / "tokenizer.json"
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer(folder) == folder / "tokenizer.json"


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1, -1000])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=r"truncated.*Fetch it again"):
        load_model(folder)


def test_truncated_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder)


def test_header_that_lies_about_its_length(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((2**62).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_model(folder)


def test_missing_tensor_is_never_made_up(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update(surprise=torch.zeros(3)))
    with pytest.raises(CheckpointError, match="'surprise'"):
        load_model(folder)


def test_wrong_shape(folder: Path) -> None:
    rewrite(
        folder, lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 47)})
    )
    with pytest.raises(CheckpointError, match=r"down_proj.*\[32, 47\].*\[32, 48\]"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[7:9].fill_(value))
    with pytest.raises(CheckpointError, match=r"2 of 1,536 weights of .*up_proj.* are NaN"):
        load_model(folder)


def test_infinities_that_cancel_are_found(folder: Path) -> None:
    def change(tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 1] = -float("inf")

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="2 of"):
        load_model(folder)


def test_large_finite_weights_are_accepted(folder: Path) -> None:
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(3e38))
    load_model(folder)


def test_missing_shard_and_index_that_leaves_the_folder(tmp_path: Path, tiny_decoder) -> None:
    whole = tmp_path / "x"
    tiny_decoder("llama").save_pretrained(whole, max_shard_size="20KB")
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    sorted(broken.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_model(broken)
    index = whole / "model.safetensors.index.json"
    escaped = json.loads(index.read_text())
    secret = tmp_path / "model-secret.safetensors"
    save_file({"lm_head.weight": torch.zeros(97, 32)}, secret)
    escaped["weight_map"]["lm_head.weight"] = "../model-secret.safetensors"
    index.write_text(json.dumps(escaped))
    with pytest.raises(CheckpointError, match="inside the folder"):
        load_model(whole)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"transformer.wte.weight": b}])
@pytest.mark.parametrize("writer", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_malicious_pickle_is_refused_and_not_executed(
    folder: Path, tmp_path: Path, name: str, writer, wrap
) -> None:
    (folder / "model.safetensors").unlink()
    if name == "model.pt":
        (folder / "config.json").unlink()
        (folder / "config.yaml").write_text(
            "model: {d_model: 8, n_heads: 2, n_layers: 1, vocab_size: 9, embedding_size: 9, rope: "
            "true, include_bias: false, layer_norm_with_affine: false}"
        )
    target = tmp_path / "executed"
    writer(wrap(Bomb(target)), folder / name)
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        load_model(folder)
    assert not target.exists()


def test_pickle_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for content, message in (([1, 2], "holds a list"), ({"a": 3}, "a int under 'a'")):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "names no model_type"),
        ("[" * 100_000, "not JSON"),
        ('{"model_type": "olmo", "hidden_size": 1e400}', "not understood|cannot be loaded|belong"),
        ('{"model_type": "olmo", "vocab_size": 99999999999}', "larger than any dimension"),
        ('{"model_type": "olmo", "hidden_size": "wide"}', "not understood"),
        ('{"model_type": "olmo", "num_hidden_layers": 2000000}', "at most 65,536"),
        ('{"model_type": "olmo", "num_hidden_layers": 60000}', "do not belong together"),
        ('{"model_type": "olmo", "vocab_size": 2000000000}', "do not belong together"),
        ('{"model_type": "olmo", "quantization_config": {"quant_method": "x"}}', "quantised"),
    ],
)
def test_broken_configuration(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass C: pass\n")
    reconfigure(
        folder,
        model_type="custom",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},
    )
    with pytest.raises((CheckpointError, UnsupportedArchitectureError)):
        load_model(folder)
    reconfigure(folder, model_type="olmo")
    load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_unknown_architecture_names_what_is_supported(folder: Path) -> None:
    reconfigure(folder, model_type="bert")
    with pytest.raises(UnsupportedArchitectureError, match="olmo2"):
        load_model(folder)


@pytest.mark.parametrize("model_type", ["openelm", "surely_new"])
def test_an_architecture_that_only_remote_code_knows_is_refused_with_the_reason(
    folder: Path, model_type: str
) -> None:
    reconfigure(folder, model_type=model_type, auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(
        (CheckpointError, UnsupportedArchitectureError), match="never run|runs no code"
    ):
        load_model(folder)


def test_absent_folders_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="not on this machine"):
        load_model(CheckpointRef("x", "hf://org/repo", "hub", revision="main"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_same_model(folder: Path, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there, here = load_model(folder, device="cuda", dtype=dtype), load_model(folder, dtype=dtype)
    for (name, a), (_, b) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        assert a.device.type == "cuda", name
        assert torch.equal(a.cpu(), b), name
    for (name, a), (_, b) in zip(there.named_buffers(), here.named_buffers(), strict=True):
        assert torch.equal(a.cpu(), b), name


def test_moving_to_a_device_keeps_ties_and_values(folder: Path, tiny_decoder) -> None:
    model = tiny_decoder("llama", tie_word_embeddings=True)
    tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    move(model, torch.device("cpu"), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name].bfloat16())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, tables[name])  # rotary tables stay float32
