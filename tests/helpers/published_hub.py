"""The Hub with the paper's series: every published name and size, no weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_hub import FakeHub, serving

_VOCABULARY = {"vocab_size": 50_304, "max_position_embeddings": 2048, "eos_token_id": 50_279}
# Repository -> (configuration, bytes of a checkpoint).
_SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "allenai/OLMo-1B-hf": (
        {"model_type": "olmo", "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 16, **_VOCABULARY},
        4_710_000_000,
    ),
    "allenai/OLMo-7B-hf": (
        {"model_type": "olmo", "hidden_size": 4096, "intermediate_size": 11_008}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, **_VOCABULARY},
        27_500_000_000,
    ),
    "EleutherAI/pythia-1b": (
        {"model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 8, **_VOCABULARY},
        2_090_000_000,
    ),
}


@contextmanager
def published_hub(root: Path, reference_data: Path) -> Iterator[FakeHub]:
    """Serve the three series from below ``root``; ``HF_ENDPOINT`` is the caller's to set."""
    lists = reference_data / "data" / "olmo_checkpoints"
    _lay_out(root, "allenai/OLMo-1B-hf", _olmo(lists / "OLMo-1B.csv", 4_194_304))
    _lay_out(root, "allenai/OLMo-7B-hf", _olmo(lists / "OLMo-7B.csv", 4_423_680))
    steps = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    _lay_out(root, "EleutherAI/pythia-1b", (f"step{step}" for step in steps))
    with serving(root) as server:
        server.sizes = {repo: size for repo, (_, size) in _SHAPES.items()}
        yield server


def _olmo(path: Path, tokens_per_step: int) -> Iterator[str]:
    with path.open() as file:
        for row in csv.DictReader(file):
            step = int(row["Step"])
            yield f"step{step}-tokens{step * tokens_per_step // 10**9}B"


def _lay_out(root: Path, repo: str, revisions: Iterable[str]) -> None:
    config = json.dumps(_SHAPES[repo][0])
    for revision in revisions:
        folder = root / repo / revision
        folder.mkdir(parents=True, exist_ok=True)  # the list of OLMo-7B has a step twice
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_text(revision)  # so that no two are equal
