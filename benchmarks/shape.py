"""The sizes of an OLMo, and such a model with random weights: what the benchmarks measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes as ``OlmoConfig`` has them, in the words of this project."""

    num_layers: int
    d_model: int
    d_mlp: int
    num_heads: int
    vocabulary: int
    length: int

    def config(self, **keys: Any) -> Any:
        """An ``OlmoConfig``; ``keys`` replace its own."""
        from transformers import OlmoConfig

        sizes = {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_attention_heads": self.num_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.length,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        return OlmoConfig(**sizes | keys)

    def model(self, *, seed: int = 0, **keys: Any) -> Any:
        """The model in evaluation mode, the same for the same seed."""
        import torch
        from transformers import OlmoForCausalLM

        torch.manual_seed(seed)
        return OlmoForCausalLM(self.config(**keys)).eval()

    @property
    def body_flops_per_token(self) -> int:
        """Of the body's products, two a multiply-add, without attention over other tokens."""
        return 2 * self.num_layers * (4 * self.d_model**2 + 3 * self.d_model * self.d_mlp)

    @property
    def attention_flops_per_token(self) -> int:
        """QKᵀ and PV over half of the keys, as causal attention needs them at full length."""
        return 2 * self.num_layers * self.d_model * self.length

    @property
    def head_flops_per_token(self) -> int:
        return 2 * self.d_model * self.vocabulary


#: Of scoring and evaluation on a CPU.
MIDDLE = Shape(8, 512, 2048, 8, 50304, 2048)
#: Of scanning and training on a CPU.
SMALL = Shape(6, 384, 1536, 6, 16384, 1024)
OLMO_1B = Shape(16, 2048, 8192, 16, 50304, 2048)
OLMO_7B = Shape(32, 4096, 11008, 32, 50304, 2048)
