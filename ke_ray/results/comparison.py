"""Comparison of checkpoints, and of corpora, by the coefficient files of scans.

Within one scan every two checkpoints of a training run are compared on every corpus, and every two
corpora at each checkpoint. Of two scans, the checkpoints of the same name, series and seed are
compared. All layers of a whole series do not fit into memory: a pass over the files takes as many
layers of all checkpoints as 256 MiB hold.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ke_ray.core import similarity
from ke_ray.errors import ResultsError
from ke_ray.results.columns import schema
from ke_ray.results.scan_folder import ScanFolder

SCHEMA = schema("comparison")
_BLOCK_BYTES = 256 * 2**20
_SHOWN = 3


@dataclass(frozen=True)
class Measured:
    """One coefficient file.

    Attributes:
        run: series and seed of the checkpoint: of one run memories have the same numbers.
    """

    folder: ScanFolder
    checkpoint: str
    step: int | None
    corpus: str
    run: tuple[str | None, str | None]

    def read(self) -> np.ndarray:
        """C̄ [n_layers, d_mlp] float32."""
        return self.folder.mean_coefficients(self.checkpoint, self.corpus)

    def __str__(self) -> str:
        return f"'{self.checkpoint}' on '{self.corpus}' in '{self.folder.uri}'"


def compare(uris: Sequence[str], limit: int | None = None) -> Iterator[pa.Table]:
    """Tables in the columns of ``comparison``; what is to be compared is checked at the call.

    Rows of layers come first, those of all layers (``layer`` null, the mean over layers) last.

    Args:
        uris: one scan folder, or two.
        limit: keep at most this many checkpoints, evenly spaced, the first and the last included.

    Raises:
        ResultsError: a folder is no scan's, nothing in it can be compared, or what should be
            compared has other layers or other numbers of memories.
    """
    folders = [ScanFolder.open(uri) for uri in uris]
    listed = [_measured(folder, limit) for folder in folders]
    if len(folders) == 1:
        groups, pairs = _within(listed[0])
        if not groups and not pairs:
            raise ResultsError(
                f"'{uris[0]}' has coefficients of {len(listed[0])} checkpoints and corpora, no two "
                "of which are of one training run; expected at least two. Memories of different "
                "runs and sizes have nothing to do with each other. Scan more checkpoints of one "
                "run, or one checkpoint on a second corpus."
            )
    else:
        groups, pairs = [], _across(*listed)
        if not pairs:
            names = [sorted({file.checkpoint for file in files})[:_SHOWN] for files in listed]
            raise ResultsError(
                f"'{uris[0]}' and '{uris[1]}' have coefficients of no checkpoint of the same name, "
                "series and seed "
                f"({' and '.join(', '.join(some) or 'none' for some in names)}, …). Give two scans "
                "of the same series."
            )
    _check_shapes(groups, pairs)
    return itertools.chain(
        itertools.chain.from_iterable(_compare_group(group) for group in groups),
        (_compare_pair(one, other) for one, other in pairs),
    )


def _measured(folder: ScanFolder, limit: int | None) -> list[Measured]:
    """The coefficient files of a folder, in training order."""
    kept = set(folder.list_coefficients())
    columns = ["checkpoint", "step", "corpus", "series", "seed", "status"]
    rows = folder.entropy().select(columns).to_pylist()
    files: dict[tuple[str, str], Measured] = {}
    for row in rows:
        name, corpus = row["checkpoint"], row["corpus"]
        if row["status"] == "ok" and folder.coefficients_name(name, corpus) in kept:
            run = (row["series"], row["seed"])
            files[name, corpus] = Measured(folder, name, row["step"], corpus, run)
    names = list(dict.fromkeys(name for name, _ in files))
    if limit is not None and len(names) > limit:
        chosen = np.linspace(0, len(names) - 1, limit).round().astype(int)
        names = [names[number] for number in chosen]
    return [file for file in files.values() if file.checkpoint in set(names)]


def _within(
    files: Sequence[Measured],
) -> tuple[list[list[Measured]], list[tuple[Measured, Measured]]]:
    """(runs on a corpus with two checkpoints or more, pairs of corpora of one checkpoint)"""
    runs: dict[tuple[object, ...], list[Measured]] = {}
    by_name: dict[str, list[Measured]] = {}
    for file in files:
        runs.setdefault((file.corpus, *file.run), []).append(file)
        by_name.setdefault(file.checkpoint, []).append(file)
    groups = [group for group in runs.values() if len(group) > 1]
    return groups, [pair for own in by_name.values() for pair in itertools.combinations(own, 2)]


def _across(
    files: Sequence[Measured], others: Sequence[Measured]
) -> list[tuple[Measured, Measured]]:
    same: dict[tuple[object, ...], list[Measured]] = {}
    for other in others:
        same.setdefault((other.checkpoint, *other.run), []).append(other)
    return [(file, other) for file in files for other in same.get((file.checkpoint, *file.run), [])]


def _check_shapes(
    groups: Sequence[Sequence[Measured]], pairs: Sequence[tuple[Measured, Measured]]
) -> None:
    """Refuse what has other layers or memories, all of it in one message."""

    @functools.cache
    def size(file: Measured) -> tuple[int, ...]:
        return similarity.widths(file.read())

    wanted = [(group[0], other) for group in groups for other in group[1:]]
    unlike = [pair for pair in [*wanted, *pairs] if size(pair[0]) != size(pair[1])]
    if unlike:
        shown = "; ".join(
            f"{one} has {_describe(size(one))}, {other} has {_describe(size(other))}"
            for one, other in unlike[:_SHOWN]
        )
        more = f"; and {len(unlike) - _SHOWN} more pairs" if len(unlike) > _SHOWN else ""
        raise ResultsError(
            f"Not the same memories: {shown}{more}. Compare checkpoints of one architecture and "
            "size, in a scan folder of their own."
        )


def _describe(widths: Sequence[int]) -> str:
    each = sorted(set(widths))
    return f"{len(widths)} layers of {' or '.join(f'{width:,}' for width in each)} memories"


def _compare_group(files: Sequence[Measured]) -> Iterator[pa.Table]:
    """Every two checkpoints of a run on one corpus: a table per layer, then one of the means."""
    first = files[0].read()
    n_layers, widest = first.shape
    per_pass = max(1, _BLOCK_BYTES // max(1, len(files) * widest * first.itemsize))
    upper = np.triu_indices(len(files), 1)
    mean = _Mean()
    for start in range(0, n_layers, per_pass):
        layers = slice(start, start + per_pass)
        block = np.empty((len(files), *first[layers].shape), first.dtype)
        for number, file in enumerate(files):
            block[number] = file.read()[layers]
        for layer, matrices in enumerate(similarity.over_layers(block), start):
            values = {name: matrix[upper] for name, matrix in matrices.items()}
            mean.add(values)
            yield _table(files, upper, layer, values)
    yield _table(files, upper, None, mean.values())


def _compare_pair(one: Measured, other: Measured) -> pa.Table:
    """All layers of two files, then their mean."""
    block = np.stack([one.read(), other.read()])
    at, mean = (np.array([0]), np.array([1])), _Mean()
    tables = []
    for layer, matrices in enumerate(similarity.over_layers(block)):
        values = {name: matrix[at] for name, matrix in matrices.items()}
        mean.add(values)
        tables.append(_table([one, other], at, layer, values))
    return pa.concat_tables([*tables, _table([one, other], at, None, mean.values())])


class _Mean:
    """Means over the layers that have a value."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, values: dict[str, np.ndarray]) -> None:
        for name, own in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.nan_to_num(own)
            self._counts[name] = self._counts.get(name, 0) + np.isfinite(own)

    def values(self) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {name: own / self._counts[name] for name, own in self._sums.items()}


def _table(
    files: Sequence[Measured],
    at: Sequence[Any],
    layer: int | None,
    values: dict[str, np.ndarray],
) -> pa.Table:
    arrays: dict[str, Any] = {"layer": [layer] * len(at[0])}
    for end, numbers in zip(("from", "to"), at, strict=True):
        for name in ("checkpoint", "step", "corpus"):
            arrays[f"{end}_{name}"] = [getattr(files[number], name) for number in numbers]
    arrays |= {name: pa.array(own, pa.float64(), from_pandas=True) for name, own in values.items()}
    return pa.Table.from_pydict({name: arrays[name] for name in SCHEMA.names}, SCHEMA)
