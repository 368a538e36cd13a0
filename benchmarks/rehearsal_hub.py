"""A stand-in of the Hub whose weight files are made while they are sent.

A file of 4.6 GB needs 16 MiB of this process: its safetensors header is the true one of the
architecture, its tensors are one block of random float32 weights over and over. Everything else
(names, listings, redirects) is the stand-in's that the tests use.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from fake_hub import FakeHub, Handler

_BLOCK_BYTES = 2**24
#: Largest shard that the published checkpoints have.
MAX_SHARD_BYTES = 4_950_000_000


class WeightFile:
    """A safetensors file of random float32 weights, as bytes at any offset.

    Args:
        shapes: tensor name → shape.
        seed: of the weights.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.names = list(shapes)
        self._header = len(text).to_bytes(8, "little") + text
        self._block = _random_block(seed)
        self.size_bytes = len(self._header) + end

    def chunks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from ``start`` up to ``end``."""
        while start < end:
            if start < len(self._header):
                chunk = memoryview(self._header)[start:end]
            else:
                offset = (start - len(self._header)) % _BLOCK_BYTES
                chunk = self._block[offset : offset + end - start]
            yield chunk
            start += len(chunk)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks(0, self.size_bytes):
            digest.update(chunk)
        return digest.hexdigest()


def _random_block(seed: int) -> memoryview:
    """Weights about as large as a trained model's; OLMo's normalisation has none."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(_BLOCK_BYTES // 4, dtype=np.float32) * np.float32(0.02)
    return memoryview(weights.tobytes())


def checkpoint_files(config: Any, seed: int) -> dict[str, WeightFile]:
    """The weight files of a checkpoint of this config, in shards as they are published."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ())
        if config.tie_word_embeddings
        else set()
    )
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = MAX_SHARD_BYTES
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        size = 4 * tensor.numel()
        if size > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        room -= size
        shards[-1][name] = tuple(tensor.shape)
    if len(shards) == 1:
        return {"model.safetensors": WeightFile(shards[0], seed)}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": WeightFile(
            shapes, seed + 1000 * number
        )
        for number, shapes in enumerate(shards, start=1)
    }


class GeneratingHub(FakeHub):
    """The tests' stand-in, with files that are made while they are sent.

    Attributes:
        generated: (repository, revision) → its weight files.
        sent_bytes: of weight files, so far.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, _Handler)
        self.generated: dict[tuple[str, str], dict[str, WeightFile]] = {}
        self.sent_bytes = 0
        self._digests: dict[WeightFile, str] = {}

    def add(self, repo: str, revision: str, config: Any, files: dict[str, WeightFile]) -> None:
        """A revision; its files are hashed now, as the Hub lists their hashes."""
        folder = self.root / repo / revision
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        for name, file in files.items():
            (folder / name).touch()
            if file not in self._digests:
                self._digests[file] = file.sha256()
        if len(files) > 1:
            names = {tensor: name for name, file in files.items() for tensor in file.names}
            index = {"metadata": {}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.generated[repo, revision] = files

    def weights(self, repo: str, commit: str, name: str, data: bytes) -> tuple[int, str]:
        file = self.weight_file(repo, commit, name)
        return (
            (file.size_bytes, self._digests[file])
            if file
            else super().weights(repo, commit, name, data)
        )

    def weight_file(self, repo: str, commit: str, name: str) -> WeightFile | None:
        folder = self.folder(repo, commit)
        return self.generated.get((repo, folder.name), {}).get(name) if folder else None


class _Handler(Handler):
    server: GeneratingHub

    def file(self, repo: str, commit: str, name: str) -> None:
        file = self.server.weight_file(repo, commit, name)
        if file is None:
            super().file(repo, commit, name)
            return
        _, digest = self.server.weights(repo, commit, name, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, file.size_bytes) if wanted and wanted[2] else file.size_bytes
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", commit)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size_bytes}")
        self.end_headers()
        if self.command == "GET":
            for chunk in file.chunks(start, end):
                self.wfile.write(chunk)
                with self.server.lock:
                    self.server.sent_bytes += len(chunk)


@contextmanager
def generating_hub(root: Path) -> Iterator[GeneratingHub]:
    server = GeneratingHub(root)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
