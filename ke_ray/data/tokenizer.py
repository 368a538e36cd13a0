"""Tokenizers: loaded from a file, folder or Hub repo; trained; saved for other tools.

No id is looked up by name here. The end-of-text id comes from the model's config (or the user),
because names can be wrong: in one published OLMo tokenizer id 50279, the config's end of text, is
the placeholder for IP addresses, and ``<|endoftext|>`` is id 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ke_ray import storage
from ke_ray.data.deadline import START_TIMEOUT_S, within
from ke_ray.data.text_file import read_text
from ke_ray.data.tokenizer_trial import try_tokenizer
from ke_ray.errors import DataError

SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?(:[\w./-]+)?")
_FILE_NAME = "tokenizer.json"
_KIND = "a tokenizer.json"
_REMEDY = (
    "ke_ray reads that file alone, and runs no code of a repository. Where transformers has the "
    "tokenizer (SentencePiece's of Llama, say), AutoTokenizer.from_pretrained(SOURCE)."
    "save_pretrained(FOLDER) writes one. Where it comes as code (tokenization_*.py), make token "
    "ids with it in an environment of your own, and give the .npy file of them as data."
)


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer with truncation and padding switched off.

    Args:
        source: a ``tokenizer.json`` (any name), a folder or URL that holds one, or a Hub repo
            ``org/name``, ``org/name@revision`` or ``org/name@revision:subfolder``; what a
            subfolder lacks is taken from the repository's root.

    Raises:
        DataError: nothing is there (reported within 20 seconds when there is no network), or it is
            not a tokenizer.
    """
    name = os.fspath(source)
    if "://" in name:
        url = name if name.endswith(".json") else storage.join(name, _FILE_NAME)
        content = within(START_TIMEOUT_S, lambda: read_text(url, _KIND), f"The tokenizer '{url}'")
    elif Path(name).is_dir():
        path = Path(name, _FILE_NAME)
        if not path.is_file():
            raise DataError(f"The folder '{name}' has no {_FILE_NAME}. {_REMEDY}")
        content = read_text(path, _KIND)
    elif Path(name).is_file():
        content = read_text(name, _KIND)
    elif _REPO.fullmatch(name) and not name.endswith(".json"):
        content = read_text(_download(name), _KIND)
    else:
        raise DataError(
            f"There is no tokenizer '{name}'; give a {_FILE_NAME}, a folder that holds one, or a "
            "Hub repo like org/name."
        )
    try_tokenizer(content, name)
    try:
        tokenizer = Tokenizer.from_str(content)
        # A file may switch truncation on; documents would then silently lose their ends.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("Two words.", add_special_tokens=False)
        tokenizer.to_str()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics beside it
        raise DataError(f"'{name}' is not {_KIND}: {error}.") from error
    return tokenizer


def _download(repo: str) -> str:
    head, _, subfolder = repo.partition(":")
    name, _, revision = head.partition("@")

    def fetch() -> str:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": revision or None, "etag_timeout": 10}
        if subfolder:
            with suppress(EntryNotFoundError):
                return str(hf_hub_download(name, f"{subfolder}/{_FILE_NAME}", **options))
        try:
            return str(hf_hub_download(name, _FILE_NAME, **options))
        except LocalEntryNotFoundError:
            raise  # the Hub did not answer
        except EntryNotFoundError as error:
            raise DataError(f"The repository '{repo}' has no {_FILE_NAME}. {_REMEDY}") from error

    return within(
        START_TIMEOUT_S,
        fetch,
        f"There is no local file or folder '{repo}', and as a Hub repo it has no {_FILE_NAME} "
        "that can be fetched",
    )


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hex digest of the tokenizer's complete definition."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """A byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: streamed once.
        vocab_size: all entries, at least 256 bytes + special tokens. The tokenizer has fewer when
            the texts do not have that many pairs.
        special_tokens: get the ids 0, 1, … in this order.

    Raises:
        DataError: ``vocab_size`` is too small.
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size is {vocab_size}; a byte-level BPE has at least {smallest} entries."
        )
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
