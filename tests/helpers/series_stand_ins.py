"""Tiny checkpoints of the open series, as their repositories store them, and scans of them."""

from __future__ import annotations

import gzip
import json
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_decoders import GROUPED, TINY, TINY_MIXTURES, random_decoder

#: Study → the model type of its repository.
MODEL_TYPES = {
    "pythia": "gpt_neox",
    "olmo1": "olmo",
    **dict.fromkeys(("olmo2", "lment"), "olmo2"),
    "olmo3": "olmo3",
    **dict.fromkeys(("smollm2", "amber", "marin", "opencoder"), "llama"),
    "datadecide": "hf_olmo",
    "smollm3": "smollm3",
    "apertus": "apertus",
    "olmoe": "olmoe",
    **dict.fromkeys(("babylm", "bgpt"), "gpt2"),
    "pico": "pico_decoder",
}
_WORDS = [f"word{number}" for number in range(60)]
# The names of these repositories for the parts of a Llama; {i} is the layer.
_PICO = {
    "embed_tokens": "embedding_proj",
    "layers.{i}.self_attn": "layers.{i}.attention",
    "layers.{i}.mlp.gate_proj": "layers.{i}.swiglu.w_0",
    "layers.{i}.mlp.up_proj": "layers.{i}.swiglu.w_1",
    "layers.{i}.mlp.down_proj": "layers.{i}.swiglu.w_2",
    "layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    "layers.{i}.post_attention_layernorm": "layers.{i}.swiglu_norm",
    "norm": "output_norm",
    "lm_head": "de_embedding_proj",
}
_PICO_CONFIG = {
    "model_type": "pico_decoder",
    "auto_map": {"AutoModelForCausalLM": "pico_decoder.PicoDecoderHF"},
    "d_model": 16,
    "n_layers": 2,
    "vocab_size": 50_304,  # the study's end of text is OLMo's
    "max_seq_len": 64,
    "attention_n_heads": 4,
    "attention_n_kv_heads": 2,
    "activation_hidden_dim": 48,
}
_DATADECIDE_CONFIG = {
    "model_type": "hf_olmo",
    "activation_type": "swiglu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "sequential",
    "clip_qkv": None,
    "d_model": 32,
    "embedding_size": 97,
    "eos_token_id": 2,
    "include_bias": False,
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "max_sequence_length": 64,
    "mlp_ratio": 3,
    "n_heads": 4,
    "n_layers": 2,
    "norm_after": False,
    "pad_token_id": 1,
    "rope": True,
    "rope_theta": 10_000,
    "scale_logits": False,
    "vocab_size": 97,
    "weight_tying": False,
}


def write_checkpoints(study: str, folders: Iterable[Path]) -> None:
    """A tiny checkpoint of the study's architecture in each folder, each with other weights."""
    model_type = MODEL_TYPES[study]
    if model_type in ("pico_decoder", "hf_olmo"):
        is_pico = model_type == "pico_decoder"
        config = _PICO_CONFIG if is_pico else _DATADECIDE_CONFIG
        sizes = {"hidden_size": 16, "vocab_size": 50_304} if is_pico else {"num_key_value_heads": 4}
        model = random_decoder("llama", GROUPED | sizes)
        for seed, folder in enumerate(folders):
            tensors = _pico(model) if is_pico else _datadecide(model)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(config))
            scaled = {name: tensor * (1 + seed / 50) for name, tensor in tensors.items()}
            save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
        return
    model = random_decoder(model_type, (TINY | TINY_MIXTURES)[model_type])
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)


def _pico(model: Any) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in model.state_dict().items():
        for own, theirs in _PICO.items():
            pattern = re.escape(own).replace(r"\{i\}", r"(\d+)") + r"(?=\.)"
            short = re.sub(f"^{pattern}", theirs.replace("{i}", r"\1"), name.removeprefix("model."))
            if short != name.removeprefix("model."):
                break
        renamed[f"pico_decoder.{short}"] = tensor.detach()
    return renamed


def _datadecide(model: Any) -> dict[str, torch.Tensor]:
    own = {name.removeprefix("model."): t.detach() for name, t in model.state_dict().items()}
    tensors = {
        "wte.weight": own["embed_tokens.weight"],
        "ln_f.weight": own["norm.weight"],
        "ff_out.weight": own["lm_head.weight"],
    }
    for layer in range(2):
        block, part = f"blocks.{layer}", f"layers.{layer}"
        attention = [own[f"{part}.self_attn.{each}_proj.weight"] for each in "qkv"]
        ffn = [own[f"{part}.mlp.{each}_proj.weight"] for each in ("up", "gate")]
        tensors |= {
            f"{block}.att_proj.weight": torch.cat(attention),
            f"{block}.attn_out.weight": own[f"{part}.self_attn.o_proj.weight"],
            f"{block}.ff_proj.weight": torch.cat(ffn),
            f"{block}.ff_out.weight": own[f"{part}.mlp.down_proj.weight"],
            f"{block}.attn_norm.weight": own[f"{part}.input_layernorm.weight"],
            f"{block}.ff_norm.weight": own[f"{part}.post_attention_layernorm.weight"],
        }
    return {f"model.transformer.{name}": tensor for name, tensor in tensors.items()}


def write_tokenizer(path: Path) -> None:
    """A tokenizer of sixty words, whose ids are in every tiny vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number + 3 for number, word in enumerate(_WORDS)} | {"?": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_documents(path: Path) -> None:
    """Documents of those words, as Dolma's files store them."""
    generator = torch.Generator().manual_seed(0)
    with gzip.open(path, "wt") as file:
        for _ in range(24):
            words = torch.randint(0, len(_WORDS), (20,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(_WORDS[word] for word in words)}) + "\n")


def run_studies(scans: dict[str, tuple[str, list[str]]]) -> dict[str, Any]:
    """Run scan studies, one after the other in one Ray session.

    Args:
        scans: name → study file and overrides.

    Returns:
        name → what each came to: the number of failures, or the traceback.
    """
    from worker_server import use_worker_server

    from ke_ray.engine.cluster.session import ray_session

    use_worker_server()
    outcomes: dict[str, Any] = {}
    with ray_session(num_cpus=2):
        for name, (study, overrides) in scans.items():
            try:
                outcomes[name] = _scan(study, overrides)
            except Exception:
                outcomes[name] = traceback.format_exc()
    return outcomes


def _scan(path: str, overrides: list[str]) -> int:
    from ke_ray.config import load_study
    from ke_ray.engine.scan.run import run_scan
    from ke_ray.outcomes import Display
    from ke_ray.planning.scan import prepare_scan
    from ke_ray.studies.scan import ScanStudy
    from ke_ray.tracking.tracker import open_tracker

    study = load_study(path, ScanStudy, overrides)
    with open_tracker(study.mlflow) as tracker:
        return len(run_scan(prepare_scan(study), Display(), tracker).failures)


if __name__ == "__main__":  # in a process that has HF_ENDPOINT from its start
    print(json.dumps(run_studies(json.load(sys.stdin))))
