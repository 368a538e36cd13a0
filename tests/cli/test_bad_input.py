"""Bad input: one clear message, exit code 2, nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from ke_ray.checkpoints import hub

MESSAGE_LINES = 1


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the config of a small OLMo and weights that nobody gets to read."""
    import torch
    from transformers import OlmoConfig

    folder = tmp_path / "series" / "step10"
    OlmoConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=0,
    ).save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(4 * 16).reshape(4, 16).astype(np.uint16) % 60)
    return path


@pytest.fixture
def refused(ke_ray, tmp_path):
    """Run a command that must be refused, and check how."""

    def run(*arguments, expected: str, output: Path | None = None):
        out = output or tmp_path / "out"
        existed = out.exists()
        result = ke_ray(*arguments)
        assert result.code == 2, result.err
        message = result.err.strip().splitlines()
        assert len(message) == MESSAGE_LINES, result.err
        assert message[0].startswith("ke-ray: ")
        assert expected in message[0]
        assert "Traceback" not in result.err
        assert existed or not out.exists(), "something was written"
        return message[0]

    return run


def scan_arguments(checkpoint, data, tmp_path, **options):
    values = {"num-instances": 4, "sequence-length": 16, "output": tmp_path / "out"} | options
    flags = [part for key, value in values.items() for part in (f"--{key}", value)]
    return ["scan", checkpoint, "--data", f"x={data}", "--no-mlflow", *flags]


def test_no_such_folder(refused, ids, tmp_path):
    place = tmp_path / "nowhere"
    refused(*scan_arguments(place, ids, tmp_path), expected=str(place))


def test_an_empty_folder(refused, ids, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(*scan_arguments(tmp_path / "empty", ids, tmp_path), expected="empty")


def test_no_such_revision(refused, checkpoint):
    refused("checkpoints", checkpoint.parent, "--revisions", "main*", expected="main*")


def test_a_step_pattern_that_is_no_expression(refused, checkpoint):
    refused("checkpoints", checkpoint.parent, "--step-pattern", "(", expected="step_pattern '('")


def test_a_hub_that_does_not_answer_is_said_within_20_seconds(refused, monkeypatch):
    # A socket that accepts and stays silent: the worst kind of network.
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub._FIRST_ANSWER_S < 20
        monkeypatch.setattr(hub, "_FIRST_ANSWER_S", 1.0)
        refused("checkpoints", "allenai/OLMo-1B-hf", expected="allenai/OLMo-1B-hf")


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.jsonl.gz"])
@pytest.mark.parametrize(
    "bad", ['{"text": "half', '{"id": "no text"}', '{"text": 5}', "[1]", '{"text": ""}']
)
def test_malformed_documents_name_file_and_line(refused, checkpoint, tmp_path, name, bad):
    lines = [json.dumps({"text": "a document"}), bad]
    path = tmp_path / name
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    tokenizer = make_tokenizer(tmp_path)
    arguments = scan_arguments(checkpoint, path, tmp_path, tokenizer=tokenizer)
    message = refused(*arguments, expected=name)
    assert "line 2" in message


def make_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "document": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_an_empty_file_of_documents(refused, checkpoint, tmp_path):
    (tmp_path / "documents.jsonl").write_text("")
    arguments = scan_arguments(
        checkpoint, tmp_path / "documents.jsonl", tmp_path, tokenizer=make_tokenizer(tmp_path)
    )
    refused(*arguments, expected="documents.jsonl")


def test_documents_without_a_tokenizer(refused, checkpoint, tmp_path):
    (tmp_path / "documents.jsonl").write_text('{"text": "a document"}\n')
    arguments = scan_arguments(checkpoint, tmp_path / "documents.jsonl", tmp_path)
    refused(*arguments, expected="tokenizer")


def test_token_ids_beyond_the_vocabulary(refused, checkpoint, tmp_path):
    np.save(tmp_path / "ids.npy", np.full((4, 16), 64, np.uint16))
    refused(*scan_arguments(checkpoint, tmp_path / "ids.npy", tmp_path), expected="64")


def test_sequences_beyond_the_positions(refused, checkpoint, ids, tmp_path):
    arguments = scan_arguments(checkpoint, ids, tmp_path, **{"sequence-length": 33})
    refused(*arguments, expected="32 positions")


def test_more_instances_than_the_corpus_has(refused, checkpoint, ids, tmp_path):
    arguments = scan_arguments(checkpoint, ids, tmp_path, **{"num-instances": 5})
    message = refused(*arguments, expected="5")
    assert "4" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "num_instance=3"], "Did you mean 'num_instances'"),
        (["--set", "batch_size=big"], "'batch_size'"),
        (["--set", "batch_size"], "KEY=VALUE"),
        (["--measures", "knowlege_entropy"], "Did you mean 'knowledge_entropy'"),
        (["--dtype", "int8"], "dtype"),
        (["--resuscitate", "ratio=2,factor=1"], "resuscitation.ratio"),
        (["--resuscitate", ""], "--resuscitate is ''; expected KEY=VALUE"),
        (["--resuscitate", "ratio"], "--resuscitate is 'ratio'; expected KEY=VALUE"),
        (["--resuscitate", "ratio=0.5,factor=0"], "resuscitation.factor"),
    ],
)
def test_wrong_options(refused, checkpoint, ids, tmp_path, arguments, expected):
    refused(*scan_arguments(checkpoint, ids, tmp_path), *arguments, expected=expected)


def test_two_corpora_of_one_name(refused, checkpoint, ids, tmp_path):
    arguments = scan_arguments(checkpoint, ids, tmp_path)
    refused(*arguments, "--data", tmp_path / "x.npy", expected="names 'x' twice")


def test_missing_options_are_named(ke_ray, checkpoint):
    result = ke_ray("scan", checkpoint)
    assert result.code == 2
    assert "data, output must be given" in result.err


def test_an_output_of_another_identity(refused, ke_ray, checkpoint, ids, tmp_path):
    from ke_ray.results import ScanFolder, new_manifest

    identity = {
        "measure_version": 1,
        "dtype": "float32",
        "top_k_fraction": 0.01,
        "dormant_threshold": 0.1,
        "resuscitation": None,
        "corpora": {"x": "0" * 64},
    }
    out = tmp_path / "out"
    manifest = new_manifest("scan", {}) | {
        "identity": identity,
        "corpora": {"x": {"sha256": "0" * 64}},
        "measures": [],
    }
    ScanFolder(str(out), manifest).write_manifest()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments = scan_arguments(checkpoint, ids, tmp_path)
    refused(*arguments, expected="data_sha256", output=out)
    refused(*arguments, "--dtype", "bfloat16", expected="dtype float32", output=out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_output_that_is_a_file(refused, checkpoint, ids, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = scan_arguments(checkpoint, ids, tmp_path, output=tmp_path / "file" / "out")
    refused(*arguments, expected="choose another folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_without_permission(refused, checkpoint, ids, tmp_path):
    if os.getuid() == 0:
        # Root may write anywhere but where the kernel itself refuses.
        if not Path("/sys/kernel").is_dir():
            pytest.skip("running as root, and there is no /sys that refuses root too")
        out = Path("/sys/kernel/ke_ray-out")
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        out = tmp_path / "locked" / "out"
    arguments = scan_arguments(checkpoint, ids, tmp_path, output=out)
    refused(*arguments, expected="permission denied", output=out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    """ENOSPC from a real device, on the path that all result files take."""
    from ke_ray import storage
    from ke_ray.errors import StorageError

    def onto_full_device(descriptor):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)

    monkeypatch.setattr("ke_ray.storage.files.hold", onto_full_device)
    with pytest.raises(StorageError, match="no space is left"):
        storage.write_atomic(tmp_path / "x", b"x" * 100_000)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_names_the_supported_ones(refused, ids, tmp_path, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "jetmoe"
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = refused(*scan_arguments(checkpoint, ids, tmp_path), expected="jetmoe")
    assert "olmo" in message


def test_results_of_nothing(ke_ray, tmp_path):
    result = ke_ray("results", tmp_path / "nowhere")
    assert result.code == 2
    assert "nowhere" in result.err


def test_no_thread_is_left_by_a_refusal(refused, ids, tmp_path):
    before = threading.active_count()
    refused(*scan_arguments(tmp_path / "nowhere", ids, tmp_path), expected="nowhere")
    assert threading.active_count() <= before + 1
