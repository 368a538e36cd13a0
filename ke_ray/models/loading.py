"""Loading of a model from a checkpoint folder.

Every way in which a checkpoint can be broken becomes a :class:`CheckpointError`: a truncated
file, tensors that are missing (transformers would silently make up random ones), unexpected or of
the wrong shape, NaN or infinite weights, a pickle with anything but tensors. Code that comes with
a checkpoint never runs.

safetensors files are memory-mapped and each byte is read once. On an accelerator every parameter
goes there as stored and changes its dtype there, so that neither a second copy in host memory nor
a conversion on the CPU is paid.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ke_ray.checkpoints.formats.foreign import explain_quantised
from ke_ray.checkpoints.formats.layout import Layout
from ke_ray.checkpoints.formats.local import base_folder
from ke_ray.checkpoints.formats.nanochat import read_nanochat_config
from ke_ray.checkpoints.formats.olmo import native_config, split
from ke_ray.checkpoints.formats.pico import read_pico_config
from ke_ray.checkpoints.formats.weights import WeightFiles, is_buffer, open_weights, read_layout
from ke_ray.checkpoints.reference import CheckpointRef, local_folder
from ke_ray.errors import (
    CheckpointError,
    DeviceMemoryError,
    UnsupportedArchitectureError,
    UserError,
)
from ke_ray.models.architectures import check_config, check_measurable
from ke_ray.models.memory import free_memory, is_out_of_memory, memory_of
from ke_ray.storage import parse_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_CONFIG_LIMIT = 16 * 2**20  # bytes of a config.json
_INT_LIMIT = 2**31
_COUNTS = re.compile(r"(?:layers?|labels|blocks|heads|experts)$")
_MAX_COUNT = 65_536
# Models of several modalities whose text decoder transformers reads out of the whole checkpoint.
_WITH_TEXT_DECODER = ("qwen3_5",)
# transformers' switches for progress bars and log level are process-wide.
_QUIET = threading.Lock()


def load_config(checkpoint: CheckpointRef | str | Path) -> PreTrainedConfig:
    """The transformers configuration of a local checkpoint; reads no weights.

    Raises:
        CheckpointError: absent or malformed.
        UnsupportedArchitectureError: ke_ray cannot score this architecture.
    """
    folder = local_folder(checkpoint)
    return config_from(folder, read_layout(folder))


def load_model(
    checkpoint: CheckpointRef | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a decoder in evaluation mode, without gradients.

    Args:
        checkpoint: a local folder, in transformers' or OLMo's own layout.
        dtype: of all parameters; float32 by default, whatever the file stores.
        device: where the parameters go.
        attn_implementation: passed to transformers; None takes its default.

    Returns:
        A causal language model, or its bare body where the files hold no language-model head.

    Raises:
        CheckpointError: the checkpoint is broken; the message says how.
        DeviceMemoryError: the device has too little memory for it.
        UnsupportedArchitectureError: ke_ray cannot score this architecture.
    """
    import torch

    folder = local_folder(checkpoint)
    layout = read_layout(folder)
    config = config_from(folder, layout)
    target_dtype, target_device = dtype or torch.float32, torch.device(device)
    with _fitting(folder, layout, target_dtype, target_device), _explained(folder), quiet():
        weights = open_weights(folder, layout)
        stored = _stored_dtype(weights)
        # On the CPU transformers converts while it copies out of the map; elsewhere, see above.
        first = target_dtype if target_device.type == "cpu" else stored or target_dtype
        model = _build(folder, layout, config, weights, first, attn_implementation)
        if target_device.type != "cpu":
            move(model, target_device, target_dtype)
    model.eval().requires_grad_(False)
    check_finite(model, str(folder))
    return model


def check_finite(model: PreTrainedModel, origin: str) -> None:
    """Raise CheckpointError where a parameter holds NaN or an infinity."""
    import torch

    for name, parameter in model.named_parameters():
        # A sum is finite for all but broken weights, reads once and needs no second tensor.
        if torch.isfinite(parameter.detach().sum()) or torch.isfinite(parameter.detach()).all():
            continue
        bad = int((~torch.isfinite(parameter.detach())).sum())
        raise CheckpointError(
            f"'{origin}': {bad:,} of {parameter.numel():,} weights of '{name}' are NaN or infinite "
            f"(as {parameter.dtype})."
        )


def config_from(folder: Path, layout: Layout, *, must_be_known: bool = True) -> PreTrainedConfig:
    """The transformers configuration that a folder's config file describes; needs no weights.

    Raises:
        CheckpointError: malformed.
        UnsupportedArchitectureError: it ``must_be_known``, and ke_ray cannot score it.
    """
    if layout.format == "nanochat":
        config = read_nanochat_config(base_folder(folder) / layout.config)
    elif (native := native_config(base_folder(folder), layout)) is not None:
        with _explained(folder):
            config = native.to_transformers()
    elif (pico := read_pico_config(base_folder(folder) / layout.config)) is not None:
        config = pico
    else:
        config = _read_hf_config(base_folder(folder) / layout.config)
    if must_be_known:
        check_config(config)
    return config


def _read_hf_config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    if path.stat().st_size > _CONFIG_LIMIT:
        raise CheckpointError(f"'{path}' has more than {_CONFIG_LIMIT:,} bytes; is it a config?")
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"'{path}' names no model_type; expected a transformers config.")
    # "quantization" is MLX's, "compression_config" that of older compressed-tensors.
    for key in ("quantization_config", "quantization", "compression_config"):
        if quantization := values.get(key):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise CheckpointError(explain_quantised(f"'{path}'", method or f"'{key}'"))
    _check_integers(values, path)
    if values["model_type"] == "openelm":
        import ke_ray.models.openelm  # noqa: F401 - registers its classes with transformers
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        return config.get_text_config() if config.model_type in _WITH_TEXT_DECODER else config
    except Exception as error:  # transformers raises whatever a wrong value happens to cause
        check_measurable(values["model_type"])
        code = " Code that comes with a checkpoint is never run." if "auto_map" in values else ""
        raise CheckpointError(
            f"'{path}' (model_type {values['model_type']!r}) is not understood by transformers: "
            f"{_first_line(error)}{code}"
        ) from error


def _check_integers(value: Any, path: Path, depth: int = 0) -> None:
    if isinstance(value, dict | list):
        if depth > 32:
            raise CheckpointError(f"'{path}' is nested more than 32 levels deep.")
        for item in value.values() if isinstance(value, dict) else value:
            _check_integers(item, path, depth + 1)
        for key, number in value.items() if isinstance(value, dict) else ():
            # transformers makes lists and dicts of these lengths.
            if isinstance(number, int | float) and _COUNTS.search(key) and number > _MAX_COUNT:
                raise CheckpointError(
                    f"'{path}' has {key}={number:.3g}; ke_ray expects at most {_MAX_COUNT:,}."
                )
    elif isinstance(value, int) and abs(value) >= _INT_LIMIT:
        raise CheckpointError(f"'{path}' holds the number {value:.3g}, larger than any dimension.")


def _build(
    folder: Path,
    layout: Layout,
    config: PreTrainedConfig,
    weights: WeightFiles,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    model_class = _model_class(folder, layout, config, weights)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "ignore_mismatched_sizes": True,  # reported below, by name
        "output_loading_info": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if (native := native_config(base_folder(folder), layout)) is not None:
        named = split(weights, native, origin=f"'{folder}'")
        model, info = model_class.from_pretrained(None, state_dict=named, **options)
    elif layout.weights[0].endswith(".safetensors") and not (
        weights.renamed
        or layout.config != "config.json"  # elsewhere, which transformers does not expect
        or (layout.index and not (folder / layout.index).is_file())
    ):
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **options
        )
    else:
        named = {name: weights[name] for name in weights}
        model, info = model_class.from_pretrained(None, state_dict=named, **options)
    _check_info(folder, info)
    return model


def _model_class(
    folder: Path, layout: Layout, config: PreTrainedConfig, weights: WeightFiles
) -> Any:
    """The class to build, tried without memory first: the files must be able to fill it."""
    import torch
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", 0) or 0
    described, model = 0, None
    if layers <= len(weights):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        if layout.format == "hf" and _is_bare(model, weights):
            model = model.base_model
        described = sum(parameter.numel() for parameter in model.parameters())
    num_elements = weights.num_elements()
    if model is None or described > 2 * num_elements + 1_000_000:
        raise CheckpointError(
            f"'{folder}': the configuration describes {layers:,} layers and {described:,} "
            f"parameters, the weight files hold {len(weights):,} tensors of {num_elements:,} "
            "elements in all; they do not belong together, or files are missing."
        )
    return type(model)


def _is_bare(model: PreTrainedModel, weights: WeightFiles) -> bool:
    """Whether the files are those of a base model: no prefix of the body, and no head.

    A head that shares the embedding's weights is there whenever the embedding is.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    return not any(
        stored.startswith((f"{name}.", f"{model.base_model_prefix}.")) for stored in weights
    )


def require_head(model: Any, purpose: str) -> Any:
    """The module that makes logits of final hidden states.

    Raises:
        UnsupportedArchitectureError: the model has none; ``purpose`` says what needs it.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedArchitectureError(
            f"{purpose} needs a language-model head, and this checkpoint is a base model "
            f"({type(model).__name__}) without one: it was not saved from a causal language model. "
            "Its other measures work; for this, give the checkpoint that AutoModelForCausalLM "
            "saved."
        )
    return head


def _check_info(folder: Path, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not is_buffer(name))
    wrong = sorted(info["mismatched_keys"], key=str)
    if wrong:
        name, shape, expected = (*wrong[0], "?", "?")[:3]
        raise CheckpointError(
            f"'{folder}': {len(wrong)} tensors have the wrong shape, the first '{name}': found "
            f"{list(shape)}, the configuration asks for {list(expected)}."
        )
    if missing:
        raise CheckpointError(
            f"'{folder}': {len(missing)} tensors are missing from the weight files, the first "
            f"'{missing[0]}'; fetch the checkpoint again."
        )
    if unexpected:
        raise CheckpointError(
            f"'{folder}': the weight files hold {len(unexpected)} tensors that the model does not "
            f"have, the first '{unexpected[0]}'; is config.json of this checkpoint?"
        )
    if info.get("error_msgs"):
        raise CheckpointError(f"'{folder}': {info['error_msgs'][0]}")


def _stored_dtype(weights: WeightFiles) -> torch.dtype | None:
    """The one floating dtype of all tensors, or None where they differ."""
    kinds = {weights.dtype(name) for name in weights}
    floating = {kind for kind in kinds if kind is not None and kind.is_floating_point}
    return floating.pop() if len(floating) == 1 else None


def move(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters to ``device``, then to ``dtype`` there; buffers keep their dtype, ties hold."""
    done: set[int] = set()
    for parameter in model.parameters():
        if id(parameter) not in done:  # tied parameters once
            done.add(id(parameter))
            parameter.data = parameter.data.to(device).to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.config.dtype = dtype


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, UserError):
        raise
    except Exception as error:  # whatever a broken file made transformers or torch raise
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"'{folder}' cannot be loaded: {_first_line(error)}") from error


@contextmanager
def _fitting(
    folder: Path, layout: Layout, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Say what did not fit where memory runs out: nothing is wrong with the checkpoint."""
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: its traceback keeps alive the weights that were loaded already.
    free_memory(device)
    files = [base_folder(folder) / name for name in layout.weights]
    num_bytes = sum(file.stat().st_size for file in files)
    raise DeviceMemoryError(
        f"'{folder}' has {num_bytes / 1e9:.3g} GB of weights on disk, to be loaded as {dtype}, "
        f"and {memory_of(device)}: they do not fit. Use a device with more memory, dtype "
        "bfloat16, or fewer scorers (num_actors)."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no details'}"[:500]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no load report from transformers: what matters is raised."""
    from transformers.utils import logging as transformers_logging

    with _QUIET:
        level = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()
