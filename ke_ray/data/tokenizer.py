"""Tokenizers: loaded from a file, folder or Hub repo; trained; saved for other tools.

No id is ever looked up by name here. The end-of-text id comes from the model's config (or the
user), because names lie: in one published OLMo tokenizer id 50279, the config's end of text, is
the placeholder for IP addresses, and ``<|endoftext|>`` is id 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ke_ray import storage
from ke_ray.data.deadline import START_TIMEOUT_S, within
from ke_ray.data.sources import reading
from ke_ray.errors import DataError

SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_FILE_NAME = "tokenizer.json"


def load_tokenizer(place: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer with truncation and padding switched off.

    Args:
        place: a ``tokenizer.json`` (any name), a folder or URL that holds one, or a Hub repo
            ``org/name`` or ``org/name@revision``.

    Raises:
        DataError: nothing is there (said within 20 seconds when the network is gone), or it is
            not a tokenizer.
    """
    text = os.fspath(place)
    if "://" in text:
        url = text if text.endswith(".json") else storage.join(text, _FILE_NAME)
        content = within(START_TIMEOUT_S, lambda: _read(url), f"The tokenizer '{url}'")
    elif Path(text).is_dir():
        path = Path(text, _FILE_NAME)
        if not path.is_file():
            raise DataError(f"The folder '{text}' has no {_FILE_NAME}; name a tokenizer file.")
        content = _read(str(path))
    elif Path(text).is_file():
        content = _read(text)
    elif _REPO.fullmatch(text) and not text.endswith(".json"):
        content = _read(_download(text))
    else:
        raise DataError(
            f"There is no tokenizer '{text}'; give a {_FILE_NAME}, a folder that holds one, or a "
            "Hub repo like org/name."
        )
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"'{text}' is not a tokenizer.json: {error}.") from error
    # A file may ask for truncation; documents would then lose their ends without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(url: str) -> str:
    with reading(url):
        try:
            return storage.read_text(url)
        except UnicodeDecodeError as error:
            raise DataError(f"'{url}' is not a tokenizer.json: not UTF-8 text.") from error


def _download(repo: str) -> str:
    name, _, revision = repo.partition("@")

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(name, _FILE_NAME, revision=revision or None, etag_timeout=10))

    return within(
        START_TIMEOUT_S,
        fetch,
        f"There is no local file or folder '{repo}', and as a Hub repo it has no {_FILE_NAME} "
        "that can be fetched",
    )


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hex digest of the tokenizer's whole definition."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """A byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: streamed once.
        vocab_size: entries in all, at least 256 bytes + special tokens. Fewer come out when the
            texts do not have that many pairs.
        special_tokens: get the ids 0, 1, … in this order.

    Raises:
        DataError: ``vocab_size`` is too small.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise DataError(f"A byte-level BPE has at least {least} entries; {vocab_size} were asked.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    *,
    eos_token_id: int,
    pad_token_id: int | None = None,
) -> None:
    """Write ``tokenizer.json`` and the config that ``AutoTokenizer`` (and lm-eval) reads.

    Raises:
        DataError: an id that the tokenizer does not have.
        StorageError: no space or no permission.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for key, token_id in (("eos_token", eos_token_id), ("pad_token", pad_token_id)):
        if token_id is None:
            continue
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise DataError(
                f"The tokenizer has {tokenizer.get_vocab_size()} entries and no id {token_id} "
                f"to be its {key}."
            )
        config[key] = token
    storage.write_atomic(storage.join(folder, _FILE_NAME), tokenizer.to_str(pretty=True))
    config_text = json.dumps(config, indent=2, ensure_ascii=False)
    storage.write_atomic(storage.join(folder, "tokenizer_config.json"), config_text + "\n")
