"""Files that somebody else made: each is refused in one message, soon, and in little memory."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ke_ray import storage
from ke_ray.checkpoints.fetch.checkpoint import fetch_into
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import weights_sha256
from ke_ray.checkpoints.reference import CheckpointRef
from ke_ray.checkpoints.transfer import RetryPolicy, download
from ke_ray.data.document import parse_document
from ke_ray.data.sources import list_files
from ke_ray.data.stored_array import safetensors_arrays
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.errors import CheckpointError, CheckpointSpecError, DataError, KeRayError, StorageError
from ke_ray.models.configuration import read_config
from ke_ray.models.loading import load_config
from ke_ray.report.terminal import headline_rows

_MANY = b"[" + b"[]," * 5_000_000 + b"[]]"


def refused(call: Callable[[], object], expected: str, kind: type[KeRayError] = KeRayError) -> None:
    started = time.process_time()
    with pytest.raises(kind, match=expected):
        call()
    assert time.process_time() - started < 15


@pytest.mark.parametrize("text", [b"[" * 100_000, _MANY, b'{"kind": 1e', b"\xff\xfe\x00"])
def test_json_is_refused_by_depth_and_by_items(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    refused(lambda: storage.read_json(tmp_path / "x.json"), "is not JSON", StorageError)
    refused(lambda: parse_document(b'{"text": ' + text, "line 1"), "line 1", DataError)


@pytest.mark.parametrize("manifest", ["folder", "pipe", "deep", "mapping"])
def test_a_manifest_that_is_none_ends_no_listing(tmp_path: Path, manifest: str) -> None:
    path = tmp_path / "scan" / "manifest.json"
    path.parent.mkdir()
    if manifest == "folder":
        path.mkdir()
    elif manifest == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("[" * 100_000 if manifest == "deep" else '{"kind": {}}')
    assert headline_rows([tmp_path]) == []


def test_no_path_is_no_path() -> None:
    refused(lambda: headline_rows([""]), "There is no ''")


@pytest.mark.parametrize(
    "shape",
    ["[" + "9" * 4000 + "]", "[" + "9000000000," * 200_000 + "1]", "[1e999]", "[-1]", '"7"'],
)
def test_headers_with_giant_sizes_are_refused_at_once(tmp_path: Path, shape: str) -> None:
    header = f'{{"a": {{"dtype": "I64", "shape": {shape}, "data_offsets": [0, 8]}}}}'.encode()
    path = tmp_path / "ids.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    refused(lambda: safetensors_arrays(list_files(str(path))[0]), "safetensors file", DataError)


@pytest.mark.parametrize(
    "row",
    [
        *("zip://x::LIST", "zip:///none.zip", "simplecache::zip://x::file://LIST", "github://a"),
        *("reference://x", "generic://x", "dir://x", "dbfs://x", "ftp://127.0.0.1:9/x", "tar://x"),
    ],
)
def test_rows_of_any_scheme_are_a_message(tmp_path: Path, row: str) -> None:
    path = tmp_path / "list.csv"
    row = row.replace("LIST", str(path))
    path.write_text(f"step,url\n1,{row}\n")
    for spec in (str(path), row):
        refused(lambda spec=spec: list_checkpoints(spec), r"\.", KeRayError)


def test_long_lists_are_read_in_line_with_their_length(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("step,url\n" + "1,http://h/same\n" * 8_000)
    started = time.process_time()
    names = {ref.name for ref in list_checkpoints(str(path))}
    assert time.process_time() - started < 15
    assert len(names) == 8_000
    path.write_text("step,url\n" + "".join(f"{n},http://h/{n}\n" for n in range(60_000)))
    refused(lambda: list_checkpoints(str(path)), "60,001 rows", CheckpointSpecError)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_without_plain_values_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    refused(lambda: weights_sha256(tmp_path), "expected plain ones", CheckpointError)


def test_a_full_disk_while_a_checkpoint_is_saved_is_one_message(
    tmp_path: Path,
) -> None:
    code = (
        "import resource, signal, sys\n"
        "from ke_ray.errors import StorageError\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from ke_ray.models.saving import save_model\n"
        "config = LlamaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=999)\n"
        "model = LlamaForCausalLM(config)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    save_model(model, sys.argv[1])\n"
        "except StorageError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Cannot write the checkpoint" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


class Endless(http.server.BaseHTTPRequestHandler):
    """Announces 100 bytes and sends without an end; ``/away`` leads to FTP."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()

    def do_GET(self) -> None:
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1:9/file")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * 2**20)


@pytest.fixture
def endless() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_sends_without_an_end_is_left(endless: str, tmp_path: Path) -> None:
    ref = CheckpointRef("x", f"{endless}/x", "native")
    refused(lambda: read_config(ref), "more than 67,108,864 bytes", CheckpointError)
    (tmp_path / "config.yaml").write_text("")
    refused(
        lambda: fetch_into(ref, tmp_path, max_bytes=100), "more than 100 bytes", CheckpointError
    )
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
    refused(
        lambda: load_tokenizer(f"{endless}/tokenizer.json"), "is not a tokenizer.json", DataError
    )


def test_a_redirect_to_another_protocol_is_not_followed(endless: str, tmp_path: Path) -> None:
    policy = RetryPolicy(attempts=1)
    refused(
        lambda: download(f"{endless}/away", tmp_path / "x", policy=policy),
        "no web address",
        CheckpointError,
    )


def tokenizer_with(**parts: object) -> str:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts})


def rule(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*rules: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(rules)}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"normalizer": chain(*[rule({"String": "a"}, "aa")] * 40)}, "1.1e\\+12 times"),
        ({"normalizer": chain(chain(rule({"String": "q"}, "q" * 2_000)))}, "2e\\+03 times"),
        ({"normalizer": chain(*[rule({"Regex": "."}, "x" * 4)] * 2)}, ""),
        ({"normalizer": rule({"Regex": "(a|aa)+[^a]$"}, "x")}, "does not encode"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "."),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}, "not a tokenizer"),
        ({"pre_tokenizer": {"type": "Digits"}}, "not a tokenizer"),
    ],
)
def test_tokenizers_that_take_all_time_or_memory_are_refused(
    tmp_path: Path, parts: dict[str, object], expected: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_with(**parts))
    if expected:
        refused(lambda: load_tokenizer(path), expected, DataError)
    else:
        assert load_tokenizer(path).encode("a").ids == [0]


def test_rules_whose_names_are_escaped_are_found(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = tokenizer_with(normalizer=chain(*[rule({"String": "a"}, "aa")] * 40))
    path.write_text(text.replace('"Replace"', '"\\u0052eplace"'))
    refused(lambda: load_tokenizer(path), "1.1e\\+12 times", DataError)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "llama"])
@pytest.mark.parametrize("key", ["num_labels", "num_hidden_layers"])
def test_giant_counts_of_a_configuration_are_refused(tmp_path: Path, kind: str, key: str) -> None:
    values = {"model_type": kind, key: 1_000_000_000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(lambda: load_config(tmp_path), f"{key}=1e\\+09", CheckpointError)
