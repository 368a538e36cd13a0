"""A corpus: N instances of at most T tokens, and the fingerprint of exactly those.

The fingerprint is sha256 over N, the lengths and the real token ids, all little-endian int32. The
padding id, the padding side and the padded width do not enter it: padding never counts.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray.core.jackknife import cut_document_factor, document_groups, group_sizes
from ke_ray.data.documents import DOCUMENT_SUFFIXES, iter_documents
from ke_ray.data.olmo_order import read_instances, read_olmo_source
from ke_ray.data.packing import check_vocabulary, pack_documents
from ke_ray.data.sampling import spread_instances
from ke_ray.data.sources import exists_locally, list_files, reading, split_part
from ke_ray.data.token_ids import TOKEN_ID_SUFFIXES, load_token_ids
from ke_ray.errors import DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ORDER_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Corpus:
    """Instances ready for a model.

    Attributes:
        name: in results.
        input_ids: [N, T] int32, right padded with 0.
        lengths: [N] int32, real tokens of each row, at least 1.
        sha256: fingerprint of the real tokens.
        source: what it was built from.
        instance_ids: [N] int64, the instances' numbers in OLMo's data; None for other sources.
        eos_token_id: what was put after each document; None for ready-made ids.
        sampling: how instances were drawn from documents: ``spread`` over the source, or the
            ``first``; ``stored`` for sources that bring their own instances and order.
        group_sizes: instances in each jackknife group; groups are contiguous. None: equal groups.
        stderr_factor: how many times too small errors may be, at worst, because groups cut
            documents; None where the documents are not known.
        note: what of the source could not be reached; None where nothing was left out.
    """

    name: str
    input_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    sha256: str
    source: str
    instance_ids: NDArray[np.int64] | None = None
    eos_token_id: int | None = None
    sampling: Literal["spread", "first", "stored"] = "stored"
    group_sizes: tuple[int, ...] | None = None
    stderr_factor: float | None = None
    note: str | None = None

    @property
    def num_instances(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def grouping(self) -> Literal["equal", "whole documents"]:
        """How jackknife groups are formed: as equal as can be, or moved to ends of documents."""
        equal = tuple(group_sizes(self.num_instances).tolist())
        return "equal" if self.group_sizes in (None, equal) else "whole documents"

    @property
    def sequence_length(self) -> int:
        """T, the width of ``input_ids``."""
        return int(self.input_ids.shape[1])

    @property
    def num_tokens(self) -> int:
        """Real tokens of all instances."""
        return int(self.lengths.sum(dtype=np.int64))

    def thinned(self, stride: int) -> Corpus:
        """Every ``stride``-th instance, the first one included, in the same jackknife groups.

        Groups without an instance left are gone; those that are left share no documents that they
        did not share before.
        """
        if stride == 1:
            return self
        chosen = np.arange(0, self.num_instances, stride)
        sizes = self.group_sizes or group_sizes(self.num_instances)
        counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[chosen])
        input_ids, lengths = self.input_ids[chosen], self.lengths[chosen]
        return replace(
            self,
            input_ids=input_ids,
            lengths=lengths,
            sha256=corpus_sha256(input_ids, lengths),
            instance_ids=None if self.instance_ids is None else self.instance_ids[chosen],
            group_sizes=tuple(counts[counts > 0].tolist()),
        )


def corpus_sha256(input_ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> str:
    """Hex sha256 of N, ``lengths`` [N] and the real ids of right-padded ``input_ids`` [N, T]."""
    digest = hashlib.sha256(b"ke_ray.corpus.1")
    digest.update(np.array([len(lengths)], "<i4").tobytes())
    digest.update(np.asarray(lengths).astype("<i4").tobytes())
    for row, length in zip(input_ids, lengths, strict=True):
        digest.update(row[: int(length)].astype("<i4").tobytes())
    return digest.hexdigest()


def parse_data_option(option: str) -> tuple[str, str]:
    """``NAME=SOURCE`` or ``SOURCE`` into name and source; the name defaults to the file's stem.

    Raises:
        DataError: the name or the source is empty, or the name is not made of letters, digits,
            ``.``, ``_`` and ``-``.
    """
    name, equals, source = option.partition("=")
    if equals and not exists_locally(option) and not re.search(r"[/\\:*?\[{]", name):
        if not _NAME.fullmatch(name) or len(name) > 80:
            raise DataError(
                f"'{option}': the corpus name '{name}' must be letters, digits, '.', '_' or '-' "
                "(at most 80)."
            )
        if not source.strip():
            raise DataError(f"'{option}' has no source after the '='; expected NAME=SOURCE.")
        return name, source
    if not option.strip():
        raise DataError("The data option is empty; expected NAME=SOURCE or SOURCE.")
    base = split_part(option)[0].split("?")[0].rstrip("/")
    stem = re.split(r"[/:]", base)[-1].split(".")[0]
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:80]
    return cleaned or "data", option


def source_kind(source: str) -> str:
    """What a source holds: ``documents``, ``token_ids`` or ``olmo``.

    Raises:
        DataError: nothing is there, or a folder mixes kinds.
    """
    if source.startswith("hf:"):
        return "documents"
    base, part = split_part(source)
    if base.lower().endswith(_ORDER_SUFFIXES):
        return "olmo"
    files = list_files(base, (*DOCUMENT_SUFFIXES, *TOKEN_ID_SUFFIXES[:2]))
    suffixes = {file.path.lower().rsplit(".", 1)[-1] for file in files}
    if suffixes <= {"npy", "safetensors"}:
        return "token_ids"
    if "parquet" not in suffixes:
        if suffixes & {"npy", "safetensors"}:
            raise DataError(f"'{source}' mixes documents and token ids; give files of one kind.")
        return "documents"
    if len(suffixes) > 1:
        raise DataError(f"'{source}' mixes Parquet with other files; give files of one kind.")
    column = part.split(",")[0].strip() if part else "input_ids"
    try:
        with reading(files[0].url), files[0].filesystem.open(files[0].path, "rb") as handle:
            schema = parquet.read_schema(handle)
    except pyarrow.ArrowException as error:
        raise DataError(f"'{files[0].url}' is not a readable Parquet file: {error}.") from error
    if column in schema.names and pyarrow.types.is_nested(schema.field(column).type):
        return "token_ids"
    return "documents"


def build_corpus(
    name: str,
    source: str,
    *,
    num_instances: int | None,
    sequence_length: int | None,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    sampling: Literal["spread", "first"] = "first",
    seed: int = 0,
) -> Corpus:
    """Read, tokenise and pack a corpus of exactly N instances.

    Args:
        source: documents (``ke_ray.data.documents``), ready-made ids (``ke_ray.data.token_ids``)
            or a YAML that describes OLMo's order (``ke_ray.data.olmo_order``).
        num_instances: N; None takes all there are.
        sequence_length: T; None (ready-made ids and OLMo's order only) takes the file's.
        tokenizer: needed for documents alone.
        eos_token_id: put after each document; from the model's config, never looked up by name.
        vocab_size: of the model; ids beyond it are refused.
        sampling: of documents: ``spread`` over the source (``ke_ray.data.sampling``), or its
            ``first`` N pieces. Ready-made ids and OLMo's data keep their own order.
        seed: of ``spread``.

    Raises:
        DataError: see the modules named above; a message names file, line, instance or position.
    """
    kind = source_kind(source)
    instance_ids: NDArray[np.int64] | None = None
    if kind == "token_ids":
        input_ids, lengths = load_token_ids(
            source,
            num_instances=num_instances,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
        )
        eos_token_id = None
    elif kind == "olmo":
        order = read_olmo_source(source)
        input_ids, instance_ids = read_instances(
            order, num_instances=num_instances, sequence_length=sequence_length
        )
        check_vocabulary(input_ids, None, vocab_size, origin=f"'{source}'")
        lengths = np.full(len(input_ids), input_ids.shape[1], np.int32)
        eos_token_id = None
    else:
        if tokenizer is None:
            raise DataError(
                f"'{source}' holds documents, which need a tokenizer; give a file, a folder or a "
                "Hub repository as --tokenizer."
            )
        if eos_token_id is None:
            raise DataError(
                f"'{source}' holds documents, which are joined by an end-of-text id, but the "
                "model's config has none; give one as --eos-token-id."
            )
        if sequence_length is None:
            raise DataError(f"'{source}' holds documents; give a sequence length.")
        sample = _draw_documents(
            source,
            tokenizer,
            sequence_length,
            eos_token_id,
            num_instances=num_instances,
            vocab_size=vocab_size,
            seed=seed if sampling == "spread" else None,
        )
        return replace(sample, name=name)
    return Corpus(
        name=name,
        input_ids=input_ids,
        lengths=lengths,
        sha256=corpus_sha256(input_ids, lengths),
        source=source,
        instance_ids=instance_ids,
        eos_token_id=eos_token_id,
    )


def _draw_documents(
    source: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    eos_token_id: int,
    *,
    num_instances: int | None,
    vocab_size: int | None,
    seed: int | None,
) -> Corpus:
    """A corpus of documents: spread by ``seed``, or without one (or without N) the first ones."""
    note = None
    sampling: Literal["spread", "first"] = "first" if seed is None else "spread"
    if seed is not None and num_instances is not None:
        sample = spread_instances(
            source,
            tokenizer,
            num_instances=num_instances,
            sequence_length=sequence_length,
            eos_token_id=eos_token_id,
            vocab_size=vocab_size,
            seed=seed,
        )
        input_ids, middle, note = sample.input_ids, sample.middle, sample.note
        sizes = document_groups(sample.first, sample.last)
    else:
        ends: list[int] = []
        blocks = list(
            pack_documents(
                iter_documents(source),
                tokenizer,
                sequence_length=sequence_length,
                eos_token_id=eos_token_id,
                num_instances=num_instances,
                vocab_size=vocab_size,
                origin=f"'{source}'",
                document_ends=ends,
            )
        )
        if not blocks:
            raise DataError(
                f"'{source}' holds fewer than the {sequence_length} tokens of one instance; give "
                "more documents or a shorter sequence length."
            )
        input_ids = np.concatenate(blocks).astype(np.int32)
        middles = np.arange(len(input_ids)) * sequence_length + sequence_length // 2
        middle = np.searchsorted(np.array(ends), middles, side="right")
        sizes = group_sizes(len(input_ids))
    lengths = np.full(len(input_ids), sequence_length, np.int32)
    return Corpus(
        name="",
        input_ids=input_ids,
        lengths=lengths,
        sha256=corpus_sha256(input_ids, lengths),
        source=source,
        eos_token_id=eos_token_id,
        sampling=sampling,
        group_sizes=tuple(sizes.tolist()),
        stderr_factor=cut_document_factor(sizes, middle),
        note=note,
    )
