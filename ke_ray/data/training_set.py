"""Training instances: tokenised once to a file [M, T], drawn by seed, read as they are needed.

The corpus is packed once into a memory-mapped file of uint16 or uint32 in a cache folder. The
file's name is a fingerprint of its origin (files with sizes and times or versions, tokenizer, T,
EOS); it is written under a temporary name, then renamed. At most one batch of text is in memory.

Of the M instances, N are *drawn* without replacement: the first N of
``numpy.random.Generator(PCG64(seed)).permutation(M)``; held-out instances are its last n, so the
two never meet. Epoch e visits the N in the order
``Generator(PCG64([seed, e + 1])).permutation(N)``.

**Rows of a batch.** With B rows per step there are N // B steps per epoch (the rows left over
change from epoch to epoch), and row r of step s, both counted from 0, is

    drawn[order(e)[(s mod (N // B)) · B + r]],   e = s // (N // B)

which does not depend on workers or micro-batches: a worker takes its slice of the B rows.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.data.training_cache import pack_to_file, source_fingerprint
from ke_ray.errors import DataError, StorageError


@dataclass(frozen=True)
class PackedDataset:
    """N drawn instances of T tokens in a memory-mapped file of M.

    Attributes:
        path: the file of token ids, raw little-endian ``dtype``, [M, T].
        num_stored: M.
        sequence_length: T.
        dtype: ``uint16`` or ``uint32``.
        stored_sha256: of all stored ids as little-endian int32.
        drawn: [N] int64, the rows of the file that belong to this dataset.
        seed: of the draw and of the epochs' orders.
        source: the SOURCE it was built from.
        num_requested: N as requested; None when all instances were.
    """

    path: Path
    num_stored: int
    sequence_length: int
    dtype: str
    stored_sha256: str
    drawn: NDArray[np.int64] = field(repr=False)
    seed: int
    source: str
    num_requested: int | None = None

    def __len__(self) -> int:
        return len(self.drawn)

    @property
    def num_tokens(self) -> int:
        """N · T."""
        return len(self) * self.sequence_length

    @property
    def sha256(self) -> str:
        """Hex digest of the drawn instances: the stored tokens and which of them, in order."""
        digest = hashlib.sha256(f"ke_ray.training_set.1 {self.stored_sha256}".encode())
        digest.update(self.drawn.astype("<i8").tobytes())
        return digest.hexdigest()

    def rows(self, indices: NDArray[np.integer] | list[int] | range) -> NDArray[np.int64]:
        """Token ids of instances 0 ≤ index < N of this dataset, [k, T] int64.

        Only the pages behind these rows are read.
        """
        stored = np.memmap(
            self.path, dtype=self.dtype, mode="r", shape=(self.num_stored, self.sequence_length)
        )
        return stored[self.drawn[np.asarray(indices, np.int64)]].astype(np.int64)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The order in which epoch 0, 1, … visits the instances, [N] int64."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch + 1]))
        return generator.permutation(len(self))

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """N // B.

        Raises:
            DataError: fewer instances than one batch needs.
        """
        if not 1 <= global_batch_size <= len(self):
            raise DataError(
                f"The global batch has {global_batch_size} rows, but '{self.source}' gives "
                f"{len(self)} training instances of {self.sequence_length} tokens; use a batch of "
                f"1 to {len(self)} rows, shorter sequences, or a larger corpus."
            )
        return len(self) // global_batch_size


def _draw(num_stored: int, seed: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_stored)


def prepare_training_set(
    source: str,
    cache_dir: str | os.PathLike[str],
    *,
    sequence_length: int,
    tokenizer: Tokenizer | None = None,
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
    num_instances: int | None = None,
    seed: int = 0,
    max_instances: int | None = None,
) -> PackedDataset:
    """Pack a source into the cache, unless it is there, and draw N instances by seed.

    Several processes may call this at once with one ``cache_dir``: one packs, the others wait.

    Args:
        source: any source that ``build_corpus`` takes. Ready-made rows must be full (T real
            tokens): training has no padding.
        cache_dir: a local folder.
        tokenizer, eos_token_id: needed for documents.
        vocab_size: of the model; ids beyond it are refused.
        num_instances: N; None takes all.
        max_instances: pack only the first instances, up to this number, of a corpus that is too
            large to pack whole; None packs all.

    Raises:
        DataError: fewer than N instances (the message gives the number), and whatever
            ``build_corpus`` refuses.
        StorageError: no space or no permission in ``cache_dir``.
    """
    if sequence_length < 1 or (num_instances is not None and num_instances < 1):
        raise DataError(
            f"{num_instances} instances of {sequence_length} tokens were requested; both must be "
            "at least 1."
        )
    if seed < 0:
        raise DataError(f"The seed of the draw is {seed}; it must be 0 or more.")
    fingerprint = source_fingerprint(
        source,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        eos_token_id=eos_token_id,
        max_instances=max_instances,
    )
    folder = storage.local_path(cache_dir).absolute()
    data_path, about_path = folder / f"{fingerprint[:32]}.bin", folder / f"{fingerprint[:32]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{fingerprint[:32]}.lock"):
            if not (about_path.exists() and data_path.exists()):
                about = pack_to_file(
                    source,
                    data_path,
                    sequence_length=sequence_length,
                    tokenizer=tokenizer,
                    eos_token_id=eos_token_id,
                    vocab_size=vocab_size,
                    max_instances=max_instances,
                )
                storage.write_json(about_path, about)
    except OSError as error:
        raise StorageError(
            f"The packed corpus cannot be written to '{folder}': {error.strerror or error}. Free "
            "some space or choose another cache folder."
        ) from error
    about = storage.read_json(about_path)
    if vocab_size is not None and about["largest_id"] >= vocab_size:
        raise DataError(
            f"'{source}' holds token id {about['largest_id']}, outside the model's vocabulary of "
            f"{vocab_size} entries; use the tokenizer that belongs to this model."
        )
    stored = int(about["num_instances"])
    if not stored:
        raise DataError(
            f"'{source}' holds less than {sequence_length} tokens, so no instance; request shorter "
            "ones or give more documents."
        )
    if num_instances is not None and num_instances > stored:
        raise DataError(
            f"{num_instances} instances of {sequence_length} tokens were requested, but "
            f"'{source}' holds {stored}; request fewer or shorter ones, or give more documents."
        )
    return PackedDataset(
        path=data_path,
        num_stored=stored,
        sequence_length=sequence_length,
        dtype=about["dtype"],
        stored_sha256=about["sha256"],
        drawn=_draw(stored, seed)[:num_instances],
        seed=seed,
        source=source,
        num_requested=num_instances,
    )
