"""The result folder of a scan.

::

    manifest.json             config, versions, identity, corpora, checkpoints
    entropy.parquet           one row per checkpoint, corpus, layer and measure
    replicates.parquet        leave-one-group-out values of the same
    experts.parquet           of mixtures of experts: load, mass and entropy of each expert
    coefficients/X.safetensors   mean_abs_coefficients [n_layers, d_mlp] float32, as wide as the
                              widest layer; NaN beyond a layer's own memories
    parts/                    checkpoints finished since the tables were last written

Each finished checkpoint is first written to ``parts/`` and later merged into the tables, so that n
checkpoints cost n small writes, a kill loses no finished checkpoint, and readers find whole files
only. Reading joins the tables and the parts; a later row replaces an earlier one
of the same key, and a row with a value replaces a failure.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ke_ray import storage
from ke_ray.core.position import POSITION, position_key
from ke_ray.errors import ResultsError
from ke_ray.results.columns import schema, with_branch
from ke_ray.results.manifest import read_manifest, write_manifest
from ke_ray.storage.ownership import LOCK
from ke_ray.storage.sole_writer import confirm_lease

ENTROPY_SCHEMA = schema("entropy")
REPLICATES_SCHEMA = schema("replicates")
EXPERTS_SCHEMA = schema("experts")
_KEY = ("checkpoint", "corpus", "layer", "measure")


class ScanFolder:
    """Reading and writing one scan's results; safe to kill at any moment.

    Args:
        uri: the folder, a path or any fsspec URI.
        manifest: its manifest, written or not.
    """

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri = uri
        self.manifest = manifest

    @classmethod
    def open(cls, uri: str) -> ScanFolder:
        """An existing folder.

        Raises:
            ResultsError: it is not a scan's.
        """
        return cls(uri, read_manifest(uri, "scan"))

    # --- reading -------------------------------------------------------------------------------

    def entropy(self) -> pa.Table:
        """All rows in the columns of ``ENTROPY_SCHEMA``, ordered by stage, step, checkpoint."""
        tables = list(self._entropy())
        return pa.concat_tables(tables) if tables else ENTROPY_SCHEMA.empty_table()

    def _entropy(self, without: Collection[str] = ()) -> Iterator[pa.Table]:
        """The same, a table for each checkpoint."""
        first: dict[str, str] = {}
        for tables in self._by_checkpoint("entropy", ENTROPY_SCHEMA, without):
            rows = _join_rows(tables)
            _flag_duplicates(rows, first)
            yield pa.Table.from_pylist(rows, ENTROPY_SCHEMA)

    def replicates(self) -> pa.Table:
        """Leave-one-out values in the columns of ``REPLICATES_SCHEMA``."""
        tables = list(self._replicates())
        return pa.concat_tables(tables) if tables else REPLICATES_SCHEMA.empty_table()

    def _replicates(self, without: Collection[str] = ()) -> Iterator[pa.Table]:
        """The same, a table for each checkpoint: there are 64 rows for each of entropy()."""
        key = ("corpus", "measure", "layer", "group")
        return self._last_rows("replicates", REPLICATES_SCHEMA, key, without)

    def experts(self) -> pa.Table:
        """Load, mass and entropy of experts in the columns of ``EXPERTS_SCHEMA``."""
        tables = list(self._experts())
        return pa.concat_tables(tables) if tables else EXPERTS_SCHEMA.empty_table()

    def _experts(self, without: Collection[str] = ()) -> Iterator[pa.Table]:
        return self._last_rows("experts", EXPERTS_SCHEMA, ("corpus", "layer", "expert"), without)

    def _last_rows(
        self, stem: str, columns: pa.Schema, key: Sequence[str], without: Collection[str]
    ) -> Iterator[pa.Table]:
        """A table for each checkpoint, sorted by ``key``, of which the last row wins."""
        for tables in self._by_checkpoint(stem, columns, without):
            table = pa.concat_tables(tables)
            if len(tables) > 1:
                frame = table.to_pandas().drop_duplicates([*key], keep="last")
                table = pa.Table.from_pandas(frame, columns, preserve_index=False)
            yield table.sort_by([(name, "ascending") for name in key])

    def _by_checkpoint(
        self, stem: str, columns: pa.Schema, without: Collection[str] = ()
    ) -> Iterator[list[pa.Table]]:
        """The tables with rows of one checkpoint, oldest first; checkpoints in order."""

        @functools.lru_cache(2)
        def read(file: Any, number: int) -> pa.Table:
            return _conform(file.read_row_group(number), columns)

        sources: dict[str, list[tuple[Any, int]]] = {}
        positions: dict[str, tuple[Any, ...]] = {}
        for uri in self._uris(stem):
            file = storage.open_table(uri)
            for number in range(file.num_row_groups):
                keys = [name for name in ("checkpoint", *POSITION) if name in file.names]
                table = file.read_row_group(number, columns=keys)
                for row in table.group_by(keys).aggregate([]).to_pylist():
                    positions[row["checkpoint"]] = _position(row)
                    sources.setdefault(row["checkpoint"], []).append((file, number))
        for name in sorted(sources, key=positions.__getitem__):
            if name not in without:
                tables = (read(*source) for source in dict.fromkeys(sources[name]))
                yield [table.filter(pc.equal(table["checkpoint"], name)) for table in tables]

    def mean_coefficients(self, checkpoint: str, corpus: str | None = None) -> np.ndarray:
        """C̄ of one checkpoint, float32 [n_layers, d_mlp].

        Args:
            checkpoint: its name in the results.
            corpus: default: the first corpus of the scan.

        Raises:
            ResultsError: they are not in the folder; the message lists those that are.
        """
        name = self.coefficients_name(checkpoint, corpus)
        path = storage.join(self.uri, "coefficients", name)
        if not storage.exists(path):
            available = [n.removesuffix(".safetensors") for n in self.list_coefficients()]
            on = f" on corpus '{corpus}'" if corpus else ""
            raise ResultsError(
                f"'{self.uri}' has no coefficients of checkpoint '{checkpoint}'{on}; "
                f"it has: {', '.join(available) or 'none'}."
            )
        try:
            return load(storage.read_bytes(path))["mean_abs_coefficients"]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ResultsError(f"'{path}' has no mean coefficients: {error}.") from error

    def list_coefficients(self) -> list[str]:
        """The file names in ``coefficients/``."""
        return storage.list_dir(storage.join(self.uri, "coefficients"))

    def coefficients_name(self, checkpoint: str, corpus: str | None = None) -> str:
        """``X.safetensors`` for the scan's first corpus, ``X@corpus.safetensors`` for others."""
        corpora = list(self.manifest["identity"]["corpora"])
        suffix = "" if corpus is None or corpus == corpora[0] else f"@{corpus}"
        return f"{storage.slug(checkpoint)}{suffix}.safetensors"

    def finished(
        self, instances: Mapping[str, str] | None = None
    ) -> dict[tuple[str, str], set[str]]:
        """(checkpoint, corpus) → measures that have values.

        Args:
            instances: data_sha256 of each corpus whose values count; None: all values count.
        """
        table = self.entropy().select(["checkpoint", "corpus", "measure", "status", "data_sha256"])
        done: dict[tuple[str, str], set[str]] = {}
        for checkpoint, corpus, measure, status, sha256 in zip(
            *(column.to_pylist() for column in table.columns), strict=True
        ):
            if status == "ok" and (instances is None or instances.get(corpus) == sha256):
                done.setdefault((checkpoint, corpus), set()).add(measure)
        return done

    def _uris(self, stem: str) -> list[str]:
        """The table and, after it, the parts of that kind."""
        uris = []
        whole = storage.join(self.uri, f"{stem}.parquet")
        if storage.exists(whole):
            uris.append(whole)
        parts = storage.join(self.uri, "parts")
        uris += [
            storage.join(parts, name)
            for name in storage.list_dir(parts)
            if name.endswith(f".{stem}.parquet") and not name.startswith(".")
        ]
        return uris

    # --- writing -------------------------------------------------------------------------------

    def write_part(
        self,
        checkpoint: str,
        rows: Sequence[Mapping[str, Any]],
        replicates: pa.Table | None = None,
        coefficients: Mapping[str, np.ndarray] | None = None,
        experts: pa.Table | None = None,
    ) -> None:
        """Write finished results of one checkpoint; the rows are written last and make them valid.

        Args:
            rows: entropy rows of this checkpoint.
            replicates: their leave-one-out values.
            coefficients: corpus → C̄ float32 [n_layers, d_mlp].
            experts: of a mixture, load, mass and entropy of its experts.
        """
        for corpus, array in (coefficients or {}).items():
            payload = save(
                {"mean_abs_coefficients": np.ascontiguousarray(array, dtype=np.float32)},
                metadata={"checkpoint": checkpoint, "corpus": corpus},
            )
            name = self.coefficients_name(checkpoint, corpus)
            storage.write_atomic(storage.join(self.uri, "coefficients", name), payload)
        stem = storage.join(self.uri, "parts", _part_name(checkpoint, rows))
        if replicates is not None and replicates.num_rows:
            storage.write_table(f"{stem}.replicates.parquet", replicates)
        if experts is not None and experts.num_rows:
            storage.write_table(f"{stem}.experts.parquet", experts)
        storage.write_table(f"{stem}.entropy.parquet", _to_table(rows))

    def consolidate(self, *, final: bool = False, without: Collection[str] = ()) -> None:
        """Merge the parts into the tables and remove them; ``final`` also closes the manifest.

        After a kill between the two, the parts are merged once more, which changes nothing.

        Args:
            final: the scan is over.
            without: checkpoints whose results of all corpora and measures are dropped, because
                their weights have changed; ``weights.parquet`` goes with them. The manifest, which
                says so, is written last.

        Raises:
            ResultsError: another command has taken over this one's lease on the folder.
        """
        parts = storage.join(self.uri, "parts")
        # Those with a dot are being written, by other threads.
        names = [name for name in storage.list_dir(parts) if not name.startswith(".")]
        if names or without or not storage.exists(storage.join(self.uri, "entropy.parquet")):
            for stem, columns, tables in (
                ("replicates", REPLICATES_SCHEMA, self._replicates(without)),
                ("experts", EXPERTS_SCHEMA, self._experts(without)),
                ("entropy", ENTROPY_SCHEMA, self._entropy(without)),
            ):
                if stem == "experts" and not self._uris(stem):
                    continue  # dense models
                self._confirm_lease()
                storage.write_tables(storage.join(self.uri, f"{stem}.parquet"), columns, tables)
            self._confirm_lease()
            for name in names:
                storage.remove(storage.join(parts, name))
        if without:  # distances from replaced weights are no longer true of their neighbours
            storage.remove(storage.join(self.uri, "weights.parquet"))
        for checkpoint in without:
            for corpus in self.manifest["identity"]["corpora"]:
                name = self.coefficients_name(checkpoint, corpus)
                storage.remove(storage.join(self.uri, "coefficients", name))
        if final:
            storage.remove(parts)
            self.manifest["status"] = "finished"
        self.write_manifest()

    def _confirm_lease(self) -> None:
        """Another command's parts are not ours to fold, nor its tables to replace."""
        confirm_lease(storage.join(self.uri, LOCK), self.uri)

    def write_manifest(self) -> None:
        """Write the manifest."""
        write_manifest(self.uri, self.manifest)


def _part_name(checkpoint: str, rows: Iterable[Mapping[str, Any]]) -> str:
    keys = sorted({f"{row.get('corpus')}/{row.get('measure')}" for row in rows})
    digest = hashlib.sha256("\n".join([checkpoint, *keys]).encode()).hexdigest()[:10]
    return f"{storage.slug(checkpoint)[:100]}-{digest}"


def _to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = ENTROPY_SCHEMA.names
    return pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows], ENTROPY_SCHEMA)


def _conform(table: pa.Table, columns: pa.Schema) -> pa.Table:
    """Columns that an older version lacked become null; unknown ones are dropped."""
    table = with_branch(table)
    arrays = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns)


def _join_rows(tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    """Rows of all tables, oldest table first; values replace failures of earlier tables."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for table in tables:
        rows = table.to_pylist()
        for checkpoint, corpus in {
            (row["checkpoint"], row["corpus"]) for row in rows if row["status"] == "ok"
        }:
            joined.pop((checkpoint, corpus, None, None), None)
            joined.pop((checkpoint, None, None, None), None)
        joined.update((tuple(row[name] for name in _KEY), row) for row in rows)
    return sorted(joined.values(), key=_order)


def _position(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key of a checkpoint in training order; by name where no number is known."""
    return *position_key(row), row["checkpoint"]


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    layer = row["layer"]
    return (
        *_position(row),
        row["corpus"] or "",
        row["measure"] or "",
        layer is None,
        layer or 0,
    )


def _flag_duplicates(rows: list[dict[str, Any]], first: dict[str, str]) -> None:
    """Set ``duplicate_of`` to the earliest checkpoint with the same weights, where there is one.

    Args:
        first: sha256 of weights → the earliest checkpoint that has them, so far.
    """
    for row in rows:
        sha256 = row["weights_sha256"]
        if sha256:
            original = first.setdefault(sha256, row["checkpoint"])
            row["duplicate_of"] = None if original == row["checkpoint"] else original
