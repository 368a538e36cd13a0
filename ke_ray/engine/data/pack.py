"""A corpus packed on Ray Data: read and tokenised on all cores, cut into row files, once.

It needs CPUs alone, so it runs before a GPU is asked for. The driver holds counts, never text or
tokens. What each task does, and why the result depends on no number of tasks, is in
``ke_ray.data.parallel_packing``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.data.parallel_packing import (
    FILE_TOKENS,
    PIECE_BYTES,
    ROWS,
    TOKENS,
    Piece,
    plan_pieces,
    plan_rows,
    tokenise_piece,
    write_row_file,
)
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.data.training_cache import id_type, source_fingerprint
from ke_ray.engine.cluster.placement_watch import watch_placement
from ke_ray.engine.cluster.session import ray_session
from ke_ray.engine.cluster.shared_storage import check_nodes_see
from ke_ray.errors import DataError, KeRayError, ResultsError
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.storage.ownership import claimed

KIND = "packed corpus"
#: (what, number done, number in all)
OnProgress = Callable[[str, int, int], None]


def pack_corpus(
    source: str,
    output: str,
    *,
    tokenizer: str,
    eos_token_id: int,
    sequence_length: int,
    piece_bytes: int = PIECE_BYTES,
    file_tokens: int = FILE_TOKENS,
    on_progress: OnProgress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Pack documents into ``output``'s row files, or go on with an earlier attempt.

    ``output/rows`` is then a source of ready-made token ids. Its rows are those that training sets
    and ``sampling: first`` make of the documents themselves, in the same order.

    Args:
        source: documents, as ``ke_ray.data.documents``.
        output: path or URI of a folder that all nodes see.
        tokenizer: as ``load_tokenizer``.
        piece_bytes, file_tokens: how the work is cut; they change no row.

    Returns:
        The manifest; ``num_instances`` and ``num_tokens`` are in it.

    Raises:
        DataError: a document is malformed, there is not one row, or the source changed meanwhile.
        ResultsError: the folder is another corpus's, or not ke_ray's.
        StorageError: it cannot be written, or not by every node.
    """
    if sequence_length < 1:
        raise DataError(f"The sequence length is {sequence_length}; it must be at least 1.")
    source = source if source.startswith("hf:") else storage.absolute(source)
    loaded = load_tokenizer(tokenizer)
    largest = max(eos_token_id, *loaded.get_vocab(with_added_tokens=True).values())

    def fingerprint() -> str:
        return source_fingerprint(
            source,
            sequence_length=sequence_length,
            tokenizer=loaded,
            eos_token_id=eos_token_id,
            max_instances=None,
        )

    identity = {
        "piece_bytes": piece_bytes,
        "file_tokens": file_tokens,
        "fingerprint": fingerprint(),
    }
    config = {
        "source": source,
        "tokenizer": tokenizer,
        "eos_token_id": eos_token_id,
        "sequence_length": sequence_length,
        "dtype": id_type(1 + largest),
    }
    with claimed(output, KIND):
        manifest = new_manifest(KIND, config) | {"identity": identity}
        if storage.exists(storage.join(output, "manifest.json")):
            manifest = read_manifest(output, KIND)
            if manifest["identity"] != identity:
                raise ResultsError(
                    f"'{output}' holds the corpus of {manifest['config']}; this one differs in "
                    "its files, tokenizer, end-of-text id or sequence length. Give another folder."
                )
            if manifest["status"] == "finished":
                storage.remove(storage.join(output, TOKENS))  # left by a kill just before
                return manifest
        write_manifest(output, manifest)
        with ray_session():
            check_nodes_see([("The source", source)], output)
            manifest |= _pack(config | identity, storage.absolute(output), loaded, on_progress)
        if fingerprint() != identity["fingerprint"]:
            raise DataError(
                f"'{source}' changed while it was packed; remove '{output}', and pack it again "
                "when its files are complete."
            )
        write_manifest(output, manifest | {"status": "finished"})
        storage.remove(storage.join(output, TOKENS))
    return manifest | {"status": "finished"}


def _pack(
    config: dict[str, Any], output: str, tokenizer: Tokenizer, on_progress: OnProgress
) -> dict[str, Any]:
    sequence_length, dtype = config["sequence_length"], config["dtype"]
    eos_token_id, file_tokens = config["eos_token_id"], config["file_tokens"]
    text = tokenizer.to_str()

    def tokenise(piece: Piece) -> dict[str, Any]:
        # The cores are shared out by Ray; a tokenizer would take all of them.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        own = Tokenizer.from_str(text)
        return tokenise_piece(piece, output, own, eos_token_id, dtype, file_tokens)

    pieces = plan_pieces(config["source"], config["piece_bytes"])
    found = _on_all_cores("pieces tokenised", tokenise, pieces, on_progress)
    counts = [piece["counts"] for piece in found]
    num_tokens = sum(sum(of_files) for of_files in counts)
    files = plan_rows(num_tokens, sequence_length, file_tokens)
    if not files:
        raise DataError(
            f"'{config['source']}' holds {num_tokens} tokens, fewer than the {sequence_length} of "
            "one row; give more documents or a shorter sequence length."
        )

    def cut(number: int) -> None:
        write_row_file(files[number], output, counts, sequence_length, dtype)

    _on_all_cores("row files written", cut, range(len(files)), on_progress)
    num_instances = files[-1].stop_row
    return {
        "num_instances": num_instances,
        "num_tokens": num_instances * sequence_length,
        "largest_id": max(piece["largest_id"] for piece in found),
        "rows": [storage.join(ROWS, file.name) for file in files],
    }


def _on_all_cores(
    what: str, function: Callable[[Any], Any], items: Sequence[Any], on_progress: OnProgress
) -> list[Any]:
    """``function`` of each item, in order; the error of the first item that has one is raised."""
    import ray

    def answer(row: dict[str, int]) -> dict[str, Any]:
        number = row["number"]
        try:
            return {"number": number, "value": json.dumps(function(items[number])), "error": None}
        except KeRayError as error:
            return {"number": number, "value": None, "error": error}

    context = ray.data.DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # whose import sets it
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A compressed file is one piece, and may take hours.
    context.execution_no_progress_timeout_s = -1
    # One block per item, so that Ray Data schedules and retries exactly our tasks.
    numbers = ray.data.from_items(
        [{"number": number} for number in range(len(items))], override_num_blocks=len(items)
    )
    rows: list[dict[str, Any]] = []
    with watch_placement():
        for row in numbers.map(answer, num_cpus=1).iter_rows():
            rows.append(row)
            on_progress(what, len(rows), len(items))
    rows.sort(key=lambda row: row["number"])
    for row in rows:
        if row["error"] is not None:
            raise row["error"]
    return [json.loads(row["value"]) for row in rows]
