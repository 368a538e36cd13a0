"""Configurations of published models whose sizes a plan should know without the network.

Facts: sizes in the ``config.json`` of each repository on the Hub (licence: Apache-2.0, of all).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Repository → transformers' model type, number of parameters, keys of the configuration.
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {}


_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _add(repo: str, model_type: str, num_parameters: int, *sizes: int, tied: bool = False) -> None:
    keys: dict[str, Any] = dict(zip(_SIZES, sizes, strict=True))
    PUBLISHED[repo] = (model_type, num_parameters, keys | {"tie_word_embeddings": tied})


_add("allenai/OLMo-1B-hf", "olmo", 1_176_764_416, 16, 2048, 8192, 16, 50304, 2048, tied=True)
_add("allenai/OLMo-7B-hf", "olmo", 6_888_095_744, 32, 4096, 11008, 32, 50304, 2048)
_add("allenai/OLMo-2-0425-1B", "olmo2", 1_484_916_736, 16, 2048, 8192, 16, 100352, 4096)
_add("EleutherAI/pythia-1b", "gpt_neox", 1_011_781_632, 16, 2048, 8192, 8, 50304, 2048)
_add("EleutherAI/pythia-1.4b", "gpt_neox", 1_414_647_808, 24, 2048, 8192, 16, 50304, 2048)
_add("EleutherAI/pythia-6.9b", "gpt_neox", 6_857_302_016, 32, 4096, 16384, 32, 50432, 2048)


def published_config(spec: str) -> PreTrainedConfig | None:
    """The configuration of the repository that a SPEC names; None where it is not in the table."""
    from transformers import AutoConfig

    if spec not in PUBLISHED:
        return None
    model_type, _, keys = PUBLISHED[spec]
    return AutoConfig.for_model(model_type, **keys)
