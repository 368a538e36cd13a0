"""Series of checkpoints, each of which makes one curve, and notes on a listing.

Two checkpoints are of one curve where architecture and sizes, seed and branch agree; the stages of
training follow on along it. A listing that mixes them is sorted so, and a note says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ke_ray.checkpoints.formats.olmo_config import parse_native_config
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.core.position import stage_key, stage_name
from ke_ray.errors import KeRayError
from ke_ray.storage import join, open_read, parse_json

_LIMIT = 16 * 2**20  # bytes of a configuration or a trainer's state
_READERS = 8
# Names of a size in the configurations of transformers.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_MEMORIES = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "activation_hidden_dim",  # Pico's
)


def series_label(model_type: str, n_layers: int, d_model: int, d_mlp: int | Sequence[int]) -> str:
    """What tells the series of one architecture and size from others, for people and tables."""
    widths = sorted({d_mlp} if isinstance(d_mlp, int) else set(d_mlp))
    memories = "–".join(dict.fromkeys((str(widths[0]), str(widths[-1]))))
    return f"{model_type}, {n_layers} layers, d_model {d_model}, d_mlp {memories}"


def with_series(refs: Sequence[CheckpointRef]) -> list[CheckpointRef]:
    """The same references with ``series`` where a folder's configuration tells it.

    Configurations on the Hub and at URLs are not requested one by one; a scan learns the series
    of every checkpoint from the model that it loads.
    """
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ke_ray-config") as pool:
        return [replace(r, series=s) for r, s in zip(refs, pool.map(_series_of, refs), strict=True)]


def _series_of(ref: CheckpointRef) -> str | None:
    if ref.format == "hub" or ref.location.startswith(("http://", "https://")):
        return None
    name = {"hf": "config.json", "native": "config.yaml"}.get(ref.format)
    content = _read_small(join(ref.location, name)) if name else None
    return None if content is None else _label_of(ref.format, content)


# The checkpoints of a run share one configuration, and YAML takes long to parse.
@lru_cache(maxsize=256)
def _label_of(layout: str, content: bytes) -> str | None:
    if layout == "native":
        try:
            config = parse_native_config(content.decode("utf-8", "replace"))
        except KeRayError:
            return None  # loading says what is wrong
        return series_label(config.model_type, config.n_layers, config.d_model, config.d_mlp)
    values = _parse(content)
    model_type = values.get("model_type")
    n_layers, d_model = _size(values, _LAYERS), _size(values, _WIDTH)
    if not isinstance(model_type, str) or n_layers is None or d_model is None:
        return None
    if model_type == "hf_olmo" or values.get("block_auto_adjust_ff_dim", model_type == "lfm2"):
        return None  # the sizes follow from the configuration by rules of the model's own
    d_mlp: int | list[int] = _size(values, _MEMORIES) or 4 * d_model
    widths = values.get("intermediate_size")
    if isinstance(widths, list) and widths and all(type(width) is int for width in widths):
        d_mlp = widths
    return series_label(model_type, n_layers, d_model, d_mlp)


def _size(values: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((values[name] for name in names if type(values.get(name)) is int), None)


def read_small_json(uri: str) -> dict[str, Any]:
    """A JSON object of at most 16 MiB; empty where it is absent, larger or not one."""
    content = _read_small(uri)
    return {} if content is None else _parse(content)


def _read_small(uri: str) -> bytes | None:
    try:
        with open_read(uri) as file:
            content = file.read(_LIMIT + 1)
    except (OSError, KeRayError):
        return None
    return content if len(content) <= _LIMIT else None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        values = parse_json(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def listing_notes(refs: Sequence[CheckpointRef]) -> list[str]:
    """Sentences on what a reader of the listing could misunderstand.

    Args:
        refs: in training order, duplicates flagged.
    """
    notes = []
    sizes = Counter(ref.series for ref in refs if ref.series)
    if len(sizes) > 1:
        notes.append(
            f"The checkpoints are of {len(sizes)} architectures or sizes, each a series and a "
            f"curve of its own: {_counts(sizes)}."
        )
    seeds = Counter(f"seed {ref.seed}" for ref in refs if ref.seed)
    if len(seeds) > 1:
        notes.append(f"The checkpoints are of several seeds, each a curve: {_counts(seeds)}.")
    stages = Counter(stage_label(ref) for ref in refs if ref.is_numbered)
    if len(stages) > 1:
        notes.append(
            f"The checkpoints are of several stages or branches: {_counts(stages)}. Stages follow "
            "on, branches are curves of their own; choose some with --revisions, such as "
            "'stage1-*'."
        )
    nameless = [ref for ref in refs if not ref.is_numbered]
    if nameless and len(refs) > 1:
        on_hub = all(ref.revision for ref in nameless)
        order = "in the Hub's order, which may not be that of training" if on_hub else "by name"
        notes.append(
            f"{len(nameless)} of {len(refs)} checkpoints have no step that can be read from "
            f"their name ({few([ref.name for ref in nameless])}): they come last, {order}. "
            "--step-pattern reads numbers from other names."
        )
    units = [unit for unit in ("tokens", "words") if refs and getattr(refs[0], unit) is not None]
    if units and refs[0].step is None:
        notes.append(f"The names count {units[0]}, not steps.")
    keys = Counter(_position(ref) for ref in refs if ref.is_numbered and not ref.duplicate_of)
    repeated = [ref for ref in refs if keys[_position(ref)] > 1]
    if repeated:
        notes.append(
            f"{len(repeated)} checkpoints share their step with another of the same series and "
            f"stage ({few([ref.name for ref in repeated])}): are they of several runs? List one "
            "run at a time."
        )
    if any(re.match(r"ckpt_0[0-9]{2}$", ref.name) for ref in refs):
        notes.append(
            "Names like 'ckpt_000' count checkpoints; the number stands in the place of the step."
        )
    return notes


def stage_label(ref: CheckpointRef) -> str:
    """``stage 2, ingredient1``, or what of it the name gives."""
    stage = stage_name(ref.stage, ref.stage_label)
    return ", ".join(filter(None, (stage, ref.branch))) or "no stage named"


def _position(ref: CheckpointRef) -> Hashable:
    return (
        ref.series,
        ref.seed,
        stage_key(ref.stage, ref.stage_label),
        ref.branch,
        ref.step,
        ref.tokens,
        ref.words,
    )


def _counts(counts: Counter[str]) -> str:
    return "; ".join(f"{label} ({number})" for label, number in counts.items())


def few(names: Sequence[str]) -> str:
    """The first five names, and how many there are beyond them."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
