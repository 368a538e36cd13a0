"""OLMo's own checkpoint layout: ``config.yaml`` and fused weights, to transformers and back.

One table says which tensors of the one layout are which rows of the other. Rows of a fused tensor
are stacked in the order given: ``att_proj`` is [q; k; v] (k and v smaller under grouped-query
attention), ``ff_proj`` is [up; gate]. OLMo-2 adds norms *after* attention and feed-forward, and
norms of queries and keys; models that are Llama to transformers have norms with weights *before*.

A configuration that transformers' OLMo, Llama and OLMo-2 classes do not reproduce exactly is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ke_ray.checkpoints.formats.layout import Layout
from ke_ray.checkpoints.formats.olmo_config import (
    NativeConfig,
    read_hf_olmo_config,
    read_native_config,
)
from ke_ray.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_Rows = Literal["whole", "qkv", "up_gate"]


@dataclass(frozen=True)
class _Rule:
    native: str
    hf: tuple[str, ...]
    rows: _Rows = "whole"


_LAYER = "model.layers.{i}."
_BLOCK = "transformer.blocks.{i}."
_ATTENTION = tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv")
_FFN_IN = tuple(f"{_LAYER}mlp.{part}_proj.weight" for part in ("up", "gate"))

_BOTH = (
    _Rule("transformer.wte.weight", ("model.embed_tokens.weight",)),
    _Rule(f"{_BLOCK}att_proj.weight", _ATTENTION, "qkv"),
    _Rule(f"{_BLOCK}attn_out.weight", (f"{_LAYER}self_attn.o_proj.weight",)),
    _Rule(f"{_BLOCK}ff_proj.weight", _FFN_IN, "up_gate"),
    _Rule(f"{_BLOCK}ff_out.weight", (f"{_LAYER}mlp.down_proj.weight",)),
)
_UNTIED = (_Rule("transformer.ff_out.weight", ("lm_head.weight",)),)
_FINAL_NORM = (_Rule("transformer.ln_f.weight", ("model.norm.weight",)),)
_LLAMA = (
    _Rule(f"{_BLOCK}attn_norm.weight", (f"{_LAYER}input_layernorm.weight",)),
    _Rule(f"{_BLOCK}ff_norm.weight", (f"{_LAYER}post_attention_layernorm.weight",)),
    *_FINAL_NORM,
)
_OLMO2 = (
    _Rule(f"{_BLOCK}q_norm.weight", (f"{_LAYER}self_attn.q_norm.weight",)),
    _Rule(f"{_BLOCK}k_norm.weight", (f"{_LAYER}self_attn.k_norm.weight",)),
    _Rule(f"{_BLOCK}attn_norm.weight", (f"{_LAYER}post_attention_layernorm.weight",)),
    _Rule(f"{_BLOCK}ff_norm.weight", (f"{_LAYER}post_feedforward_layernorm.weight",)),
    *_FINAL_NORM,
)
_NORMS: dict[str, tuple[_Rule, ...]] = {"olmo": (), "llama": _LLAMA, "olmo2": _OLMO2}


def native_config(folder: Path, layout: Layout) -> NativeConfig | None:
    """The configuration of a checkpoint whose tensors have OLMo's names; None for all others.

    Raises:
        CheckpointError, UnsupportedArchitectureError: as ``read_native_config``.
    """
    if layout.format == "native":
        return read_native_config(folder / layout.config)
    return read_hf_olmo_config(folder / layout.config)


def _rules(config: NativeConfig) -> Iterable[tuple[str, tuple[str, ...], _Rows]]:
    table = _BOTH + (() if config.tied else _UNTIED)
    table += _NORMS[config.model_type]
    for rule in table:
        for i in range(config.n_layers) if "{i}" in rule.native else (0,):
            yield rule.native.format(i=i), tuple(n.format(i=i) for n in rule.hf), rule.rows


def _row_counts(config: NativeConfig, rows: _Rows) -> list[int]:
    if rows == "qkv":
        return [config.d_model, config.d_kv, config.d_kv]
    return [config.d_mlp, config.d_mlp]


def native_shapes(config: NativeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a native checkpoint."""
    d, kv, m, v = config.d_model, config.d_kv, config.d_mlp, config.vocab_size
    by_ending = {
        "wte.weight": (v, d),
        "att_proj.weight": (d + 2 * kv, d),
        "attn_out.weight": (d, d),
        "ff_proj.weight": (2 * m, d),
        "q_norm.weight": (d,),
        "k_norm.weight": (kv,),
        "attn_norm.weight": (d,),
        "ff_norm.weight": (d,),
        "ln_f.weight": (d,),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, _, _ in _rules(config):
        if name.endswith("ff_out.weight"):
            shapes[name] = (d, m) if ".blocks." in name else (v, d)
        else:
            shapes[name] = by_ending[name.split(".", 3 if ".blocks." in name else 1)[-1]]
    return shapes


def split(
    tensors: Mapping[str, torch.Tensor], config: NativeConfig, *, origin: str
) -> dict[str, torch.Tensor]:
    """Native tensors under transformers' names; fused ones as views of their rows (no copy).

    Args:
        tensors: all tensors of a native checkpoint; a leading ``model.`` in names is ignored.
        config: its configuration.
        origin: the checkpoint's location, for messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    named = {name.removeprefix("model."): name for name in tensors}
    if config.tied:
        # Some writers store the tied head as well; it is the embedding and never used.
        named.pop("transformer.ff_out.weight", None)
    check_shapes({short: _shape(tensors, name) for short, name in named.items()}, config, origin)
    result: dict[str, torch.Tensor] = {}
    for name, hf_names, rows in _rules(config):
        tensor = tensors[named[name]]
        if rows == "whole":
            result[hf_names[0]] = tensor
        else:
            parts = tensor.split(_row_counts(config, rows), dim=0)
            result.update(zip(hf_names, parts, strict=True))
    return result


def fuse(tensors: Mapping[str, torch.Tensor], config: NativeConfig) -> dict[str, torch.Tensor]:
    """The inverse of :func:`split`: transformers' tensors under OLMo's names.

    Raises:
        CheckpointError: a tensor is missing or of the wrong shape.
    """
    import torch

    result: dict[str, torch.Tensor] = {}
    for name, hf_names, rows in _rules(config):
        absent = [hf for hf in hf_names if hf not in tensors]
        if absent:
            raise CheckpointError(f"The model has no tensor '{absent[0]}'; is it an OLMo model?")
        parts = [tensors[hf] for hf in hf_names]
        result[name] = parts[0].contiguous() if rows == "whole" else torch.cat(parts, dim=0)
    check_shapes({name: tuple(t.shape) for name, t in result.items()}, config, "the model")
    return result


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: NativeConfig, origin: str) -> None:
    """Compare names and shapes with those that the configuration describes.

    Raises:
        CheckpointError: they differ; the message names the first difference.
    """
    # Every layer has at least one tensor: do not spell out a million layers nobody stored.
    if config.n_layers > len(shapes):
        raise CheckpointError(
            f"{origin}: the configuration describes {config.n_layers:,} layers, but the weights "
            f"hold {len(shapes)} tensors; they do not belong together."
        )
    expected = native_shapes(config)
    missing = sorted(set(expected) - set(shapes))
    unexpected = sorted(set(shapes) - set(expected))
    if missing or unexpected:
        parts = [f"{len(missing)} missing (first '{missing[0]}')"] if missing else []
        parts += [f"{len(unexpected)} unexpected (first '{unexpected[0]}')"] if unexpected else []
        raise CheckpointError(
            f"{origin}: tensors do not match the configuration: {', '.join(parts)}."
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                f"{origin}: '{name}' has shape {list(shapes[name])}, the configuration asks for "
                f"{list(shape)}."
            )


def _shape(tensors: Any, name: str) -> tuple[int, ...]:
    return tensors.shape(name) if hasattr(tensors, "shape") else tuple(tensors[name].shape)
