"""What ke_ray finds in a checkpoint's model, from its configuration alone.

The model's class is built without memory, so that no weight is fetched or read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ke_ray.core.architecture import Architecture
from ke_ray.core.layers import Absence
from ke_ray.errors import CheckpointError, UnsupportedArchitectureError
from ke_ray.models.architectures import check_config
from ke_ray.models.layout import FFNLayout, describe
from ke_ray.models.loading import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def explain(config: PreTrainedConfig) -> list[str]:
    """Lines on where a model of this configuration keeps what is measured, layer by layer.

    Where ke_ray does not know the architecture, the lines say why, and list the modules of one
    layer of each kind, which is what a description has to name.

    Raises:
        CheckpointError: transformers cannot build such a model.
    """
    model = _without_memory(config)
    lines = [f"{type(model).__name__}, model type {config.model_type}"]
    try:
        layouts = describe(model)
    except UnsupportedArchitectureError as error:
        return [*lines, str(error), *_modules(model, config)]
    names = {module: name for name, module in model.named_modules()}
    start = 0
    entry = check_config(config)
    for text, same in groupby(_described(layout, names, entry) for layout in layouts):
        stop = start + len(list(same))
        numbers = f"layer {start}" if stop == start + 1 else f"layers {start} to {stop - 1}"
        lines += [f"{numbers}:", *(f"  {part}" for part in text)]
        start = stop
    return [*lines, *_logits(config)]


def _without_memory(config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever an odd configuration makes transformers raise
        raise CheckpointError(
            f"transformers has no causal language model for model type '{config.model_type}': "
            f"{type(error).__name__}: {error}".splitlines()[0]
        ) from error


def _described(
    layout: FFNLayout, names: dict[nn.Module, str], entry: Architecture
) -> tuple[str, ...]:
    """One layer, without its number, so that equal layers read the same."""

    def part(title: str, module: nn.Module | None, remark: str = "") -> str:
        if module is None:
            return f"{title} none"
        return f"{title} {_general(names[module])} {_shape(module)}{remark}"

    lines = []
    if layout.experts is not None:
        sizes, module = layout.experts.sizes, _general(names[layout.experts.module])
        lines.append(f"experts: {len(sizes)} of {sizes[0]} memories, {module}")
    elif layout.second_projection is None:
        lines.append("no feed-forward part: no memories")
    if layout.second_projection is not None:
        kind = "gated" if layout.gated else "ungated"
        act = f", {layout.activation}" if layout.activation else ""
        title = "FFN" if layout.experts is None else "shared expert"
        lines.append(f"{title}: {kind}{act}, d_mlp {layout.d_dense}")
        lines.append(part("coefficients: input of", layout.second_projection))
        lines.append(part("up:", layout.up, ", second half" if layout.fused else ""))
        lines.append(part("gate:", layout.gate, ", first half" if layout.fused else ""))
        if layout.pre_activation is not None:
            lines.append(part("pre-activation: input of", layout.pre_activation))
    lines.append(part("attention:", layout.attention))
    if layout.attention is not None:
        parts = dict(layout.attention.named_modules())
        query = parts.get(entry.low_rank_query or entry.query, parts.get(entry.query))
        lines.append(part("queries:", query))
    if layout.no_attention_entropy is not Absence.NONE:
        lines.append(f"attention_entropy: null, {layout.no_attention_entropy.reason}")
    return tuple(lines)


def _logits(config: Any) -> Iterator[str]:
    entry = check_config(config)
    for verb, key in (
        ("multiplied", entry.logit_multiplier),
        ("divided", entry.logit_divisor),
        ("soft-capped", "final_logit_softcapping"),
    ):
        if key is not None and (value := getattr(config, key, None)) is not None:
            yield f"logits: {verb} by {key} = {value:g}"


def _modules(model: nn.Module, config: Any) -> Iterator[str]:
    """The modules with weights of one decoder layer of each kind."""
    num_layers = getattr(config, "num_hidden_layers", None)
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == num_layers:
            kinds = [tuple(_leaves(layer)) for layer in layers]
            yield f"{name}: {num_layers} × {type(layers[0]).__name__}"
            for kind in dict.fromkeys(kinds):
                yield f"  as in layer {kinds.index(kind)} ({kinds.count(kind)} of them):"
                yield from (f"    {leaf}" for leaf in kind)
            return


def _leaves(layer: nn.Module) -> Iterator[str]:
    for name, module in layer.named_modules():
        own: Sequence[Any] = [*module.named_parameters(recurse=False)]
        if own:
            shapes = ", ".join(f"{n} {list(parameter.shape)}" for n, parameter in own)
            yield f"{name} ({type(module).__name__}): {shapes}"


def _shape(module: nn.Module) -> str:
    weight: Any = getattr(module, "weight", None)
    return f"({type(module).__name__})" if weight is None else str(list(weight.shape))


def _general(name: str) -> str:
    """A module's name with its layer's number as ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
