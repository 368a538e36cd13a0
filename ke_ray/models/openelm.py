"""OpenELM (arXiv 2404.14619): a decoder whose layers differ in heads and in memories.

Apple's class comes as code, which ke_ray never runs, and transformers has none; this one reads its
``config.json`` and its weights under their own names. For layer l with ``num_query_heads[l]``
query heads, ``num_kv_heads[l]`` key heads and m_l memories:

    x ← x + Wo attention(rope(norm_q(q)), rope(norm_k(k)), v),   [q | k | v] = W_qkv norm(x)
    x ← x + W_2 (act(gate) · up),                                [gate | up] = W_1 norm(x)
    m_l = the multiple of ffn_dim_divisor next to ffn_multipliers[l] · model_dim, not over 10% below

All norms are RMS norms with ε = 1e-6, those of queries and keys over one head. The rotation is in
float32 and turns (j, j + head_dim/2). The embedding is the output head, and nothing has a bias.
Read from Apple's ``modeling_openelm.py`` and ``configuration_openelm.py``, and for the lists per
layer from the published configuration of OpenELM-1.1B-Instruct. Variants that none of the four
published sizes uses (no GLU, a head of its own, unnormed queries and keys) are refused.

Importing this module registers the classes with transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.output_capturing import capture_outputs

MODEL_TYPE = "openelm"
_PUBLISHED = {
    "ffn_with_glu": True,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "normalization_layer_name": "rms_norm",
}


class OpenELMConfig(PreTrainedConfig):
    """The keys of Apple's ``config.json``; transformers' names of sizes are read from them."""

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012 - transformers' name and kind
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "hidden_act": "activation_fn_name",
    }

    vocab_size: int = 32_000
    max_context_length: int = 2048
    num_transformer_layers: int = 1
    model_dim: int = 1280
    head_dim: int = 64
    num_query_heads: list[int] | None = None
    num_kv_heads: list[int] | None = None
    ffn_multipliers: list[float] | None = None
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10_000
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for key in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
            values, kinds = getattr(self, key), (int, float) if key[0] == "f" else (int,)
            is_list = isinstance(values, list) and len(values) == self.num_transformer_layers
            if not is_list or not all(type(v) in kinds and v > 0 for v in values):
                raise ValueError(
                    f"{key}={values!r} is not a list of {self.num_transformer_layers} positive "
                    "numbers, one for each layer (num_transformer_layers)"
                )
        heads = zip(self.num_query_heads or (), self.num_kv_heads or (), strict=True)
        for layer, (queries, keys) in enumerate(heads):
            if queries % keys:
                raise ValueError(
                    f"layer {layer} has {queries} query heads, not a multiple of its {keys} key "
                    "heads (num_query_heads, num_kv_heads)"
                )
        for key, value in _PUBLISHED.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"{key}={getattr(self, key)!r}; ke_ray reads OpenELM with {key}={value!r}, as "
                    "Apple published it"
                )

    @property
    def intermediate_size(self) -> list[int]:
        """Memories of each layer."""
        widths = (float(each) * self.model_dim for each in self.ffn_multipliers or ())
        return [_divisible(width, self.ffn_dim_divisor) for width in widths]

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the last layer, which has the most."""
        return (self.num_query_heads or [1])[-1]

    @property
    def num_key_value_heads(self) -> int:
        """Key heads of the last layer, which has the most."""
        return (self.num_kv_heads or [1])[-1]


def _divisible(width: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``width``, or the next if that loses over 10%."""
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * width else nearest


class OpenELMAttention(nn.Module):
    """Grouped-query attention of one layer, by transformers' attention interface."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        assert config.num_query_heads is not None
        assert config.num_kv_heads is not None
        queries, keys = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.head_dim = config.head_dim
        self.heads = [queries, keys, keys]
        self.num_key_value_groups = queries // keys
        self.scaling = 1 / math.sqrt(config.head_dim)
        self.qkv_proj = nn.Linear(config.model_dim, sum(self.heads) * self.head_dim, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim)
        self.k_norm = LlamaRMSNorm(self.head_dim)
        self.out_proj = nn.Linear(queries * self.head_dim, config.model_dim, bias=False)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, pos, d_model] to the same, and the attention rows where they are formed."""
        shape = hidden.shape[:-1]
        rows = self.qkv_proj(hidden).view(*shape, sum(self.heads), self.head_dim).transpose(1, 2)
        query, key, value = rows.split(self.heads, dim=1)  # [batch, heads, pos, head_dim]
        query, key = apply_rotary_pos_emb(
            self.q_norm(query).float(), self.k_norm(key).float(), cos, sin
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probabilities = attend(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            mask,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(*shape, -1)), probabilities


class OpenELMFFN(nn.Module):
    """SwiGLU with m_l memories; the gate and the up projection are one."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        d_mlp = config.intermediate_size[layer]
        self.proj_1 = nn.Linear(config.model_dim, 2 * d_mlp, bias=False)
        self.proj_2 = nn.Linear(d_mlp, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same."""
        gate, up = self.proj_1(hidden).chunk(2, dim=-1)
        return self.proj_2(self.act(gate) * up)


class OpenELMLayer(GradientCheckpointingLayer):
    """Attention, then the FFN, each behind a norm and added to the residual stream."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn = OpenELMAttention(config, layer)
        self.ffn = OpenELMFFN(config, layer)
        self.attn_norm = LlamaRMSNorm(config.model_dim)
        self.ffn_norm = LlamaRMSNorm(config.model_dim)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any
    ) -> Tensor:
        """[batch, pos, d_model] to the same."""
        hidden = hidden + self.attn(self.attn_norm(hidden), mask, cos, sin, **kwargs)[0]
        return hidden + self.ffn(self.ffn_norm(hidden))


class OpenELMPreTrainedModel(PreTrainedModel):
    """What transformers has to know of both classes."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMLayer"]  # noqa: RUF012 - transformers' name and kind
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OpenELMLayer,
        "attentions": OpenELMAttention,
    }


class OpenELMModel(OpenELMPreTrainedModel):
    """The body; it keeps no cache of keys, because ke_ray generates no text."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        layers = (OpenELMLayer(config, layer) for layer in range(config.num_transformer_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which is the output head too."""
        return self.token_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.token_embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Final hidden states [batch, pos, d_model] of ids [batch, pos]."""
        hidden = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        exponents = torch.arange(0, self.config.head_dim, 2, device=hidden.device).float()
        frequencies = self.config.rope_freq_constant ** (-exponents / self.config.head_dim)
        angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)
        for layer in self.layers:
            hidden = layer(hidden, mask, angles.cos(), angles.sin(), **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class OpenELMForCausalLM(OpenELMPreTrainedModel):
    """The body with the embedding as output head."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "transformer.token_embeddings.weight"
    }

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the output head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [batch, pos, vocabulary] of ids [batch, pos]."""
        output = self.transformer(input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


AutoConfig.register(MODEL_TYPE, OpenELMConfig)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM)
