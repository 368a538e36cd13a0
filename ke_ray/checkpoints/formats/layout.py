"""The files that make a checkpoint, told from their names alone.

The same rule serves a local folder, a listing of the Hub and an object store, so that what is
listed, fetched, hashed and loaded is always the same set of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_HF_EXTRAS = ("generation_config.json", *TOKENIZER_FILES)
_SAFETENSORS_SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_BIN_SHARD = re.compile(r"pytorch_model-[0-9]+-of-[0-9]+\.bin")


@dataclass(frozen=True)
class Layout:
    """The files of one checkpoint, as names within its folder.

    Attributes:
        format: ``hf`` or ``native``; on this machine those of ``formats.local`` too.
        config: ``config.json`` or ``config.yaml``; it may be missing from a broken checkpoint.
        weights: weight files, never both safetensors and pickles; empty when there are none.
        index: the index of a sharded checkpoint.
        extras: tokenizer and generation files to take along.
    """

    format: Literal["hf", "native", "nanochat", "lightning", "dcp", "state"]
    config: str
    weights: tuple[str, ...]
    index: str | None = None
    extras: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All files to fetch, the weights last."""
        index = (self.index,) if self.index else ()
        return (self.config, *self.extras, *index, *self.weights)


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout of a folder that holds ``names``, or None where it is no checkpoint.

    safetensors are preferred to pickles. A folder with a configuration but without weights, or
    the reverse, counts as a (broken) checkpoint, so that it is reported and not passed over.
    """
    present = set(names)
    hf = _hf_weights(present)
    native = next(((name,) for name in ("model.safetensors", "model.pt") if name in present), ())
    if "config.json" in present:
        return _hf(present, *hf)
    if "config.yaml" in present:
        return Layout("native", "config.yaml", native)
    if "model.pt" in present:
        return Layout("native", "config.yaml", native)
    return _hf(present, *hf) if hf[0] else None


def _hf(present: set[str], weights: tuple[str, ...], index: str | None) -> Layout:
    extras = tuple(name for name in _HF_EXTRAS if name in present)
    return Layout("hf", "config.json", weights, index, extras)


def _hf_weights(present: set[str]) -> tuple[tuple[str, ...], str | None]:
    for single, index, shard in (
        ("model.safetensors", "model.safetensors.index.json", _SAFETENSORS_SHARD),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _BIN_SHARD),
    ):
        if single in present:
            return (single,), None
        shards = tuple(sorted(name for name in present if shard.fullmatch(name)))
        if shards or index in present:
            return shards, index
    return (), None
