"""Tokenizers: loaded from anywhere, trained the same each time, saved for other tools."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from fake_hub import serving
from tokenizers import Tokenizer

from ke_ray.data import deadline
from ke_ray.data.deadline import within
from ke_ray.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256, train_bpe
from ke_ray.errors import DataError

TEXTS = ["pack my box with five dozen liquor jugs", "jackdaws love my big sphinx of quartz"] * 5

TRAIN = """
from ke_ray.data.tokenizer import tokenizer_sha256, train_bpe
texts = ["pack my box with five dozen liquor jugs", "jackdaws love my big sphinx of quartz"] * 5
print(tokenizer_sha256(train_bpe(iter(texts), 300)))
"""


def test_file_folder_and_url_give_the_same_tokenizer(tmp_path: Path) -> None:
    trained = train_bpe(TEXTS, 300)
    save_tokenizer(trained, tmp_path, eos_token_id=0, pad_token_id=1)
    fsspec.filesystem("memory").pipe_file("/t/tokenizer.json", trained.to_str().encode())
    (tmp_path / "other.name").write_text(trained.to_str())
    places = [
        tmp_path,
        tmp_path / "tokenizer.json",
        tmp_path / "other.name",
        "memory://t",
        "memory://t/tokenizer.json",
        f"file://{tmp_path}",
    ]
    expected = trained.encode("my box of quartz").ids
    assert [load_tokenizer(place).encode("my box of quartz").ids for place in places] == [
        expected
    ] * len(places)


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    cutting = train_bpe(TEXTS, 300)
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    length = len(load_tokenizer(tmp_path).encode(TEXTS[0]).ids)
    assert 2 < length < 50


def test_training_is_the_same_in_every_process() -> None:
    hashes = {tokenizer_sha256(train_bpe(iter(TEXTS), 300))}
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", TRAIN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        hashes.add(result.stdout.strip())
    assert len(hashes) == 1


def test_a_trained_tokenizer_encodes_anything_and_loses_nothing() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.token_to_id("<|padding|>") == 1
    for text in ("pack my box", " two  blanks\n", "äöü 🐟 中文", "jugs"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with pytest.raises(DataError, match="vocab_size is 100; .*at least 258 entries"):
        train_bpe(TEXTS, 100)


def test_a_saved_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained = train_bpe(TEXTS, 300)
    save_tokenizer(trained, tmp_path, eos_token_id=0, pad_token_id=1)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    assert loaded("my box")["input_ids"] == trained.encode("my box").ids
    with pytest.raises(DataError, match="no id 300"):
        save_tokenizer(trained, tmp_path, eos_token_id=300)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    for place, message in {
        tmp_path / "tokens.json": "is not a tokenizer.json",
        tmp_path / "binary.json": "not UTF-8",
        tmp_path / "empty": "has no tokenizer.json",
        tmp_path / "none.json": "There is no tokenizer",
        "memory://none/tokenizer.json": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            load_tokenizer(place)


def test_a_tokenizer_that_comes_as_code_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenCoder's files: a SentencePiece model behind ``tokenization_inflm.py``."""
    folder = tmp_path / "hub" / "infly" / "OpenCoder-1.5B-Base" / "main"
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"\n\x05")
    (folder / "tokenization_inflm.py").write_text("raise SystemExit('code was run')")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "INFLMTokenizer"}')
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    message = r"infly/OpenCoder-1.5B-Base' has no tokenizer\.json\. .*runs no code.*\.npy file"
    with serving(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(DataError, match=message):
            load_tokenizer("infly/OpenCoder-1.5B-Base")
    with pytest.raises(DataError, match=r"has no tokenizer\.json\. .*runs no code.*\.npy file"):
        load_tokenizer(folder)


def test_a_missing_network_is_reported_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client is pointed at a port where nobody answers."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    code = (
        "from ke_ray.data import tokenizer\n"
        "from ke_ray.errors import DataError\n"
        "tokenizer.START_TIMEOUT_S = 2.0\n"
        "try: tokenizer.load_tokenizer('nobody/no-such-tokenizer')\n"
        "except DataError as error: print(error)\n"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "no local file or folder 'nobody/no-such-tokenizer'" in result.stdout
    assert deadline.START_TIMEOUT_S < 20
    assert time.monotonic() - start < 50  # a hang, not a speed, is what this would show


def test_a_call_that_never_ends_is_left_behind() -> None:
    with pytest.raises(DataError, match=r"Fetching x: no answer within 0 s\. Is there a network"):
        within(0.05, lambda: time.sleep(30), "Fetching x")
    assert within(5, lambda: 3, "x") == 3
    with pytest.raises(DataError, match="Fetching x: OSError: broken"):
        within(5, _broken, "Fetching x")


def _broken() -> Tokenizer:
    raise OSError("broken\nand more")
