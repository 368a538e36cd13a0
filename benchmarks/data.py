"""How fast text becomes instances, and how few bytes a slice of OLMo's data costs.

    python benchmarks/data.py [--json] [--rounds 12] [--megabytes 4]

Contenders, one thread each (``RAYON_NUM_THREADS=1``), CPU time, interleaved:

- *bare*: one ``tokenizers`` batch call over texts already in memory, nothing done with the result
  (``encode_batch``; and ``encode_batch_fast``, which drops offsets and is what ke_ray uses);
- *pack*: ke_ray from texts in memory to [N, T] arrays;
- *file*: ke_ray from a gzipped Dolma file (inflate, parse, check, tokenise, pack);
- *cache*: the same, hashed and written to a training set's file.

A ratio is bare time over ours, so 1 is the bare call's MB/s per core. The text is Dolma's where
reference data is present ($KE_RAY_REFERENCE_DATA/data), else generated biographies.

Then 2,048 instances of 2,048 tokens, drawn over four OLMo-style files, are read from an HTTP server
in this process that counts the bytes it is asked for: bytes asked over bytes needed must be 1.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import argparse
import gzip
import json
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from interleaved import Ratio, ratio, run_rounds
from tokenizers import Tokenizer

from ke_ray.data.biographies import iter_biographies, make_people
from ke_ray.data.documents import iter_documents
from ke_ray.data.olmo_order import OlmoSource, read_instances
from ke_ray.data.packing import pack_documents
from ke_ray.data.tokenizer import load_tokenizer, train_bpe
from ke_ray.data.training_set import prepare_training_set

EOS = 0
SEQUENCE_LENGTH = 1024
SLICE = 2048  # instances, and tokens in each
PART_INSTANCES = (3000, 2500, 3500, 1000)


def find_text(megabytes: float) -> tuple[str, list[str], Tokenizer]:
    """A description, texts of about so many MB, and a tokenizer."""
    root = Path(os.environ.get("KE_RAY_REFERENCE_DATA", "../shared"), "data")
    if (root / "dolma_sample").is_dir():
        documents = iter_documents(str(root / "dolma_sample"))
        name, tokenizer = "dolma_sample, OLMo's tokenizer", None
    else:
        people = make_people(400, seed=0)
        documents = ((d["text"], "") for d in iter_biographies(people, 60, seed=0))
        name, tokenizer = "generated biographies, BPE of 2,048", True
    texts, held = [], 0
    for text, _ in documents:
        texts.append(text)
        held += len(text.encode())
        if held > megabytes * 1e6:
            break
    if tokenizer is None:
        return name, texts, load_tokenizer(root / "tokenizer" / "olmo_hf_tokenizer.json")
    return name, texts, train_bpe(islice(texts, 2000), 2048)


def time_packing(
    megabytes: float, rounds: int, progress: Callable[[str], None]
) -> tuple[dict[str, Ratio], dict[str, Any]]:
    """Ratios of speed to the bare calls, and MB/s of each contender."""
    name, texts, tokenizer = find_text(megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    # As a training command gives it: of the model, a multiple of 64.
    vocab_size = -(-(1 + max(tokenizer.get_vocab().values())) // 64) * 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.jsonl.gz")
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"id": "x", "text": text}, ensure_ascii=False) + "\n")

        def pack(documents: Iterator[tuple[str, str]]) -> int:
            blocks = pack_documents(
                documents, tokenizer, sequence_length=SEQUENCE_LENGTH, eos_token_id=EOS
            )
            return sum(len(block) for block in blocks)

        def cache() -> None:
            with tempfile.TemporaryDirectory() as cache_dir:
                prepare_training_set(
                    str(path),
                    cache_dir,
                    sequence_length=SEQUENCE_LENGTH,
                    tokenizer=tokenizer,
                    eos_token_id=EOS,
                    vocab_size=vocab_size,
                )

        contenders: dict[str, Callable[[], object]] = {
            "bare": lambda: tokenizer.encode_batch(texts, add_special_tokens=False),
            "bare_fast": lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
            "pack": lambda: pack((text, "") for text in texts),
            "file": lambda: pack(iter_documents(str(path))),
            "cache": cache,
        }
        seconds = run_rounds(contenders, rounds, progress)
    ratios = {
        f"{ours}_to_{bare}": ratio(seconds[bare], seconds[ours], ">= 0.9")
        for ours in ("pack", "file", "cache")
        for bare in ("bare", "bare_fast")
    }
    speeds = {n: round(size / statistics.median(s), 3) for n, s in seconds.items()}
    return ratios, {"text": name, "megabytes": round(size, 2), "mb_per_s_per_core": speeds}


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


class _CountingHandler(BaseHTTPRequestHandler):
    """Serves byte ranges of ``server.folder`` and counts what it sends."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        server: Any = self.server
        path = server.folder / Path(self.path).name
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            with server.lock:
                server.body_bytes += end - start
                server.num_requests += 1
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(end - start))

    def log_message(self, *_: object) -> None:
        pass


def count_bytes() -> tuple[float, dict[str, Any]]:
    """Bytes asked over bytes needed for one slice, and what it took."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number, count in enumerate(PART_INSTANCES):
            tokens = rng.integers(0, 50_000, count * SLICE + 7, dtype=np.uint16)
            Path(folder, f"part-{number}.npy").write_bytes(tokens.tobytes())
        server: Any = _Server(("127.0.0.1", 0), _CountingHandler)
        server.folder, server.lock = Path(folder), threading.Lock()
        server.body_bytes = server.num_requests = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        source = OlmoSource(parts=tuple(f"{base}/part-{n}.npy" for n in range(len(PART_INSTANCES))))
        start = time.perf_counter()
        tokens, ids = read_instances(source, num_instances=SLICE)
        duration_s = time.perf_counter() - start
        server.shutdown()
        server.server_close()
    needed = tokens.size * 2
    held = sum(PART_INSTANCES) * SLICE * 2
    return server.body_bytes / needed, {
        "instances": len(ids),
        "bytes_asked": server.body_bytes,
        "bytes_held": held,
        "requests": server.num_requests,
        "duration_s": round(duration_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--megabytes", type=float, default=4.0)
    options = parser.parse_args()

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    ratios, speeds = time_packing(options.megabytes, options.rounds, progress)
    byte_ratio, slice_ = count_bytes()
    print(f"{speeds['megabytes']} MB of {speeds['text']}; one thread; medians of CPU time")
    for name, speed in speeds["mb_per_s_per_core"].items():
        print(f"  {name:10} {speed:7.2f} MB/s per core")
    for name, value in ratios.items():
        print(
            f"  {name:18} {value.median:.3f}  [{value.low:.3f}, {value.high:.3f}]  "
            f"target {value.target}"
        )
    print(
        f"OLMo slice: {slice_['bytes_asked']} bytes asked / needed = {byte_ratio:.4f} (target 1); "
        f"{slice_['requests']} requests, {slice_['duration_s']} s, of {slice_['bytes_held']} bytes"
    )
    if options.json:
        result = {
            "ratios": {
                **{name: value.as_json() for name, value in ratios.items()},
                "olmo_slice_bytes": {"median": round(byte_ratio, 4), "target": "1"},
            },
            "packing": speeds,
            "olmo_slice": slice_,
            "versions": {
                "python": platform.python_version(),
                "tokenizers": tokenizers.__version__,
                "numpy": np.__version__,
            },
            "machine": platform.machine(),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
