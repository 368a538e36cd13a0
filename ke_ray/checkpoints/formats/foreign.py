"""Checkpoints in formats that ke_ray does not read, recognised by the names of their files.

Each is answered with what it is and how to convert or merge it. Nothing is opened, so no pickle
is read, and the same table serves a local folder, a listing of the Hub and an object store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Parts of checkpoints that ke_ray reads: not foreign where only the other part is missing.
_OWN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|model\.pt|(optim|train)\.pt"
    r"|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|training_args\.bin|rng_state.*\.pth"
)
# Names of the parts of packed weights, as GPTQ, AWQ, bitsandbytes, MLX and others store them.
_PACKED = re.compile(
    r".*\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_packed|weight_scale(_inv)?|scales)"
)
QUANTISED_REMEDY = (
    "their values are not those that were trained; give the original checkpoint. Where there is "
    "none, AutoModelForCausalLM.from_pretrained(FOLDER).dequantize() and save_pretrained("
    "NEW_FOLDER) make a plain one"
)
_CONFIG = "on this machine, put transformers' config.json of the same model"
_SAVE = "model.save_pretrained(FOLDER)"
_REBUILD = (
    "build the transformers model, load the tensors with "
    f"torch.load(FILE, weights_only=True) and model.load_state_dict(…), then {_SAVE}"
)

# (all of these patterns match a name, what it is, what to do), the most telling first.
_FORMATS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (r"adapter_config\.json|adapter_model\.(safetensors|bin)",),
        "a LoRA/PEFT adapter, not a whole model",
        "merge it into its base model: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
        ".merge_and_unload().save_pretrained(NEW_FOLDER)",
    ),
    (
        (r".*\.gguf",),
        "a GGUF file of llama.cpp",
        "give the original checkpoint; where there is none, AutoModelForCausalLM.from_pretrained("
        f"FOLDER, gguf_file=FILE) reads it, then {_SAVE} (values stay those of the quantisation)",
    ),
    (
        (
            r"quantize_config\.json|quant_config\.json|(gptq_model|.*-4bit-).*\.(safetensors|pt|bin)",
        ),
        "a checkpoint of quantised weights",
        QUANTISED_REMEDY,
    ),
    (
        (r"model_and_optim",),
        "an OLMo-core checkpoint",
        f"{_CONFIG} one folder up (OLMo-core's own is another), or convert it with "
        "src/examples/huggingface/convert_checkpoint_to_hf.py of github.com/allenai/OLMo-core",
    ),
    (
        (r"config\.yaml", r"model|optim|train|rank\d+\.pt|.*\.distcp"),
        "a sharded OLMo checkpoint",
        "unshard it with `python scripts/unshard.py FOLDER NEW_FOLDER --model-only` of "
        "github.com/allenai/OLMo, or give its published '-unsharded' folder",
    ),
    (
        (r".*\.distcp",),
        "a torch.distributed.checkpoint (DCP) folder",
        f"{_CONFIG} in it or one folder up. For names that ke_ray does not know, run `python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pt`, then {_REBUILD}",
    ),
    (
        (r"pytorch_model_fsdp_\d+",),
        "a sharded FSDP checkpoint of accelerate",
        f"{_CONFIG} in it or one folder up, or run `accelerate merge-weights "
        "FOLDER/pytorch_model_fsdp_0 FOLDER`",
    ),
    (
        (r"zero_to_fp32\.py|global_step\d+|zero_pp_rank_.*",),
        "a DeepSpeed ZeRO checkpoint",
        f"run its own `python zero_to_fp32.py . OUTPUT`, then {_REBUILD}",
    ),
    (
        (r"mp_rank_\d+.*|layer_\d+-model_.*|latest_checkpointed_iteration\.txt",),
        "a Megatron or GPT-NeoX checkpoint",
        "convert it with that project's own converter to Hugging Face",
    ),
    (
        (r"params\.json", r"consolidated.*"),
        "a checkpoint in the original layout of Meta or Mistral",
        "convert it with transformers' convert_llama_weights_to_hf.py (or the model's own), or "
        "give the repository in transformers' layout",
    ),
    (
        (r"lit_model\.pth",),
        "a LitGPT checkpoint",
        "convert it with `litgpt convert_from_litgpt FOLDER NEW_FOLDER`",
    ),
    (
        (r".*\.ckpt",),
        "a Lightning checkpoint",
        f"{_CONFIG} beside it or one folder up",
    ),
    (
        (r"model_\d+\.pt",),
        "a nanochat checkpoint",
        "put it with its meta_<step>.json into a folder on this machine (`hf download REPO "
        "--local-dir FOLDER` fetches both) and give that",
    ),
    (
        (r"flax_model.*\.msgpack|tf_model.*\.h5|.*\.ckpt\.index|_CHECKPOINT_METADATA",),
        "a Flax or TensorFlow checkpoint",
        "convert its weights to the PyTorch model of transformers (transformers before version 5 "
        f"does with from_flax=True or from_tf=True), then {_SAVE}",
    ),
    (
        (r".*\.(pt|pth|bin|npz)",),
        "a weight file of another program (of nanoGPT, llama2.c and the like)",
        "convert it to transformers' layout: llama2.c with its `export.py NEW_FOLDER --version -1 "
        "--checkpoint FILE`, nanoGPT into GPT2LMHeadModel (Conv1D weights transposed); for others "
        f"{_REBUILD}",
    ),
    (
        (r".*\.safetensors",),
        "a safetensors file without a configuration, or under another name than model.safetensors",
        "put transformers' config.json beside it and name it model.safetensors, or load it into "
        f"the transformers model, then {_SAVE}",
    ),
)


def explain_file(name: str) -> str:
    """What to give instead of a file of this name."""
    foreign = explain_foreign([name])
    return foreign or "give the checkpoint's folder."


def explain_foreign(names: Iterable[str]) -> str | None:
    """What a folder without a readable checkpoint holds and what to do, or None.

    Args:
        names: of the files and folders in it, or of one file.
    """
    present = [name for name in names if not _OWN.fullmatch(name)]
    for patterns, kind, remedy in _FORMATS:
        matches = [
            next((name for name in present if re.fullmatch(pattern, name)), None)
            for pattern in patterns
        ]
        if None not in matches:
            return f"it is {kind} ('{matches[-1]}'), which ke_ray does not read as it is: {remedy}."
    return None


def explain_quantised(origin: str, method: str | None) -> str:
    """What to do instead of giving the quantised weights at ``origin``."""
    return (
        f"{origin}: quantised weights ({method or 'of an unnamed method'}) are not supported: "
        f"{QUANTISED_REMEDY}."
    )


def packed_name(names: Iterable[str]) -> str | None:
    """A tensor among ``names`` that is part of a quantised weight, or None."""
    return next((name for name in names if _PACKED.fullmatch(name)), None)
