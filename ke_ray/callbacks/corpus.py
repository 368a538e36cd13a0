"""D of a live measurement, from what a training script has at hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ke_ray.data.corpus import Corpus, build_corpus, corpus_sha256, parse_data_option
from ke_ray.errors import DataError

_EXPECTED = (
    "Give D as token ids: an array or tensor [instances, tokens], a list of lists, a file of them "
    "(.npy, .safetensors, .parquet), or a Corpus (ke_ray.data.corpus.build_corpus)."
)


def live_corpus(data: Any) -> Corpus:
    """A corpus of token ids that are in memory or in a file, or the given one.

    Raises:
        DataError: there are none, or they are no token ids.
    """
    if isinstance(data, Corpus):
        return data
    if isinstance(data, str | os.PathLike):
        name, source = parse_data_option(os.fspath(data))
        return build_corpus(name, source, num_instances=None, sequence_length=None)
    if data is None or len(data) == 0:
        raise DataError(f"There is no D to measure on. {_EXPECTED}")
    rows = [_ids(row, number) for number, row in enumerate(data)]
    lengths = np.array([len(row) for row in rows], np.int32)
    input_ids = np.zeros((len(rows), lengths.max()), np.int32)
    for target, row in zip(input_ids, rows, strict=True):
        target[: len(row)] = row
    return Corpus("D", input_ids, lengths, corpus_sha256(input_ids, lengths), "token ids in memory")


def _ids(row: Sequence[int], number: int) -> np.ndarray:
    ids = np.asarray(row)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"Instance {number} of D is {row!r:.80}. {_EXPECTED}")
    return ids
