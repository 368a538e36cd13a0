"""Formats of other programs are recognised by their files, and told how to become a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.errors import CheckpointError, CheckpointSpecError
from ke_ray.models.configuration import read_outline
from ke_ray.models.loading import load_model

SHARDED = ["config.yaml", "model/.metadata", "model/__0_0.distcp", "optim/.metadata", "train/r.pt"]
OLMO_CORE = ["config.json", ".metadata.json", "model_and_optim/.metadata", "train/rank0.pt"]
FORMATS = [
    (SHARDED, "sharded OLMo", r"unshard\.py"),
    (["config.yaml", "rank0.pt", "rank1.pt"], "sharded OLMo", r"unshard\.py"),
    (OLMO_CORE, "OLMo-core", r"convert_checkpoint_to_hf\.py"),
    ([".metadata", "__0_0.distcp", "__1_0.distcp"], "DCP", "dcp_to_torch"),
    (["pytorch_model_fsdp_0/.metadata"], "FSDP", r"config\.json of.*in it.*merge-weights"),
    (["config.json", "zero_to_fp32.py", "global_step50/x.pt"], "DeepSpeed", r"zero_to_fp32\.py"),
    (["latest_checkpointed_iteration.txt", "iter_0000500/x.pt"], "Megatron", "converter"),
    (["params.json", "consolidated.00.pth", "tokenizer.model"], "Meta", "convert_llama"),
    (["lit_model.pth", "model_config.yaml"], "LitGPT", "convert_from_litgpt"),
    (["epoch=3-step=500.ckpt"], "Lightning", r"config\.json of.*beside it"),
    (["model_000500.pt", "meta_000500.txt"], "nanochat", "meta_<step>.json into a folder"),
    (["ckpt.pt"], "nanoGPT", "GPT2LMHeadModel"),
    (["stories15M.bin", "tokenizer.bin"], r"llama2\.c", r"export\.py"),
    (["model-q4.gguf"], "GGUF", "gguf_file"),
    (["config.json", "model-f16.gguf"], "GGUF", "gguf_file"),
    (["adapter_config.json", "adapter_model.safetensors"], "LoRA/PEFT", "merge_and_unload"),
    (["adapter_model.bin", "README.md"], "LoRA/PEFT", "merge_and_unload"),
    (["config.json", "quantize_config.json"], "quantised", r"original checkpoint.*dequantize"),
    (["config.json", "gptq_model-4bit-128g.safetensors"], "quantised", "original checkpoint"),
    (["flax_model.msgpack", "config.json"], "Flax", "from_flax"),
    (["config.json", "weights.safetensors"], "another name", r"name it model\.safetensors"),
]


@pytest.fixture(autouse=True)
def no_pickle_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight file was opened")

    monkeypatch.setattr(torch, "load", refuse)


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else "")
    return folder


@pytest.mark.parametrize(("names", "kind", "remedy"), FORMATS)
def test_a_folder_is_told_what_it_is_and_what_to_do(
    tmp_path: Path, names: list[str], kind: str, remedy: str
) -> None:
    folder = make(tmp_path / "run" / "step100", names)
    message = rf"(?s){kind}.*does not read.*{remedy}"
    for spec in (folder, folder.parent, f"{tmp_path}/r*/step*"):
        with pytest.raises(CheckpointSpecError, match=message):
            list_checkpoints(str(spec))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["ckpt.pt", "last.ckpt", "m.gguf", "stories.bin", "adapter_model.safetensors"]
)
def test_a_single_file_is_told_what_it_is(tmp_path: Path, name: str) -> None:
    make(tmp_path, [name])
    with pytest.raises(CheckpointSpecError, match="is a file; it is a .*does not read"):
        list_checkpoints(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="is a file; it is a .*does not read"):
        load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_of_a_checkpoint_points_at_its_folder(tmp_path: Path, name: str) -> None:
    make(tmp_path, [name])
    with pytest.raises(CheckpointSpecError, match="is a file; give the checkpoint's folder"):
        list_checkpoints(str(tmp_path / name))


def test_whole_checkpoints_beside_files_of_other_programs_are_read(tmp_path: Path) -> None:
    whole = ["config.json", "model.safetensors", "zero_to_fp32.py", "optimizer.pt", "m.gguf"]
    make(tmp_path / "run" / "global_step10", [*whole, "global_step10/x.pt"])
    make(tmp_path / "run" / "global_step20", whole)
    make(tmp_path / "run", ["notes.ckpt"])
    (tmp_path / "run" / "global_step30").mkdir()
    assert [ref.step for ref in list_checkpoints(str(tmp_path / "run"))] == [10, 20]


def test_one_broken_checkpoint_of_a_series_stays_in_it(tmp_path: Path) -> None:
    make(tmp_path / "run" / "step10", SHARDED)
    make(tmp_path / "run" / "step20", ["config.json", "model.safetensors"])
    assert [ref.step for ref in list_checkpoints(str(tmp_path / "run"))] == [10, 20]


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "'quantization'"),  # MLX
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_quantised_weights_say_by_what_method(tmp_path: Path, settings: dict, method: str) -> None:
    make(tmp_path, ["model.safetensors"])
    config = {"model_type": "llama", "vocab_size": 9, "max_position_embeddings": 9, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    message = rf"quantised.*{method}.*original.*dequantize"
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
    (ref,) = list_checkpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        read_outline(ref)


@pytest.mark.parametrize("part", ["qweight", "absmax", "weight_scale_inv", "scales"])
def test_packed_weights_without_a_word_in_the_configuration(tmp_path: Path, part: str) -> None:
    tensors = {"model.layers.0.mlp.up_proj." + part: torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=rf"quantised.*up_proj\.{part}.*original"):
        load_model(tmp_path)
