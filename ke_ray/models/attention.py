"""Attention entropy of a transformers model, measured as the model runs.

An attention implementation is registered with transformers under ``ke_ray_entropy``. For the
duration of ``measure_attention`` the model uses it: each attention module hands its queries and
keys (after QK-norm and rotary embedding) to ``core.attention``, then attends as SDPA does. No
modelling code is forked. Setting an implementation changes the model's shared config, so the
former one is put back on the way out, also after an exception.

Older modelling code (GPT-Neo, GPT-J, Falcon) does not use the interface: there the model attends
eagerly, and the entropy is that of the rows which its attention modules return.

Shared key heads are repeated, the module's own scaling and sliding window are respected.
Soft-capped scores (Gemma-2) take the exact chunked rows; attention sinks and learned position
biases are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ke_ray.core.attention import attention_entropy, probabilities_entropy, rows_entropy
from ke_ray.core.precision import matmul_precision
from ke_ray.errors import UnsupportedArchitectureError
from ke_ray.models.layout import FFNLayout

IMPLEMENTATION = "ke_ray_entropy"
_SINK = "_ke_ray_entropy_sink"
_REFUSED = ("s_aux", "sinks", "position_bias", "head_mask", "alibi", "cache")


@contextmanager
def measure_attention(
    model: Any, layouts: Sequence[FFNLayout], sink: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the context every forward pass reports its attention entropies.

    Args:
        model: a transformers model that ``describe`` accepts.
        layouts: ``describe(model)``; layers whose attention entropy has no meaning are left out.
        sink: called as ``sink(layer, entropy)`` with entropy [batch, heads, pos], float32 (float64
            for a float64 model), nats; before the layer's attention output is computed, or once it
            is where the module returns its rows. Rows of padding hold numbers too; leave them
            out. It may raise to end the forward pass.

    Raises:
        UnsupportedArchitectureError: from the forward pass, for scores that are more than a
            scaled product under a mask or soft-cap.
    """
    measured = [
        (layer, layout.attention, layout.returns_attention)
        for layer, layout in enumerate(layouts)
        if layout.attention is not None and not layout.no_attention_entropy
    ]
    if not measured:
        yield
        return
    _register()
    former = model.config._attn_implementation
    with ExitStack() as stack:
        for layer, attention, returns in measured:
            report = _bound(sink, layer)
            if returns:
                handle = attention.register_forward_hook(_reading(report))
                stack.callback(handle.remove)
            else:
                setattr(attention, _SINK, report)
                stack.callback(delattr, attention, _SINK)
        if measured[0][2]:  # modelling code that reads the setting of the config at every call
            stack.callback(setattr, model.config, "_attn_implementation", former)
            model.config._attn_implementation = "eager"
        else:
            stack.callback(model.set_attn_implementation, former)
            model.set_attn_implementation(IMPLEMENTATION)
        yield


def _reading(report: Callable[[Tensor], None]) -> Callable[..., None]:
    """A hook that reports the entropy of the rows an attention module returns."""

    def after(module: nn.Module, _inputs: Any, output: Any) -> None:
        rows = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(rows, Tensor) or rows.ndim != 4:
            raise UnsupportedArchitectureError(
                f"attention entropy of {type(module).__name__} is not measured: it does not return "
                "its rows. Leave attention_entropy out of the measures."
            )
        report(probabilities_entropy(rows))

    return after


def _bound(sink: Callable[[int, Tensor], None], layer: int) -> Callable[[Tensor], None]:
    def report(entropy: Tensor) -> None:
        sink(layer, entropy)

    return report


def _ignore(_entropy: Tensor) -> None:
    pass


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's boolean mask, or ``None`` where plain causality says it all.

    Instances are right-padded and no padding mask is given, so the mask is that of one instance;
    it broadcasts over the batch.
    """
    from transformers.masking_utils import sdpa_mask

    if kwargs.get("attention_mask") is None and "batch_size" in kwargs:
        kwargs["batch_size"] = 1
    return sdpa_mask(*args, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,  # [batch, heads, pos, d_head]
    key: Tensor,  # [batch, key heads, pos, d_head]
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused or dropout:
        raise UnsupportedArchitectureError(
            f"attention entropy of {type(module).__name__} is not measured: its scores also depend "
            f"on {', '.join(refused) or 'dropout'}. Leave attention_entropy out of the measures."
        )
    sink = getattr(module, _SINK, None)
    if sink is None:  # another model that shares the measured one's config
        sink = _ignore
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key = key.repeat_interleave(shared, dim=1)
        value = value.repeat_interleave(shared, dim=1)
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    if softcap is not None or additive:
        with matmul_precision("highest"):
            entropy, output = rows_entropy(
                query, key, value, scale=scale, causal=causal, mask=attention_mask, softcap=softcap
            )
        assert output is not None
        sink(entropy)
    else:
        with matmul_precision("highest"):
            entropy = attention_entropy(query, key, scale=scale, causal=causal, mask=attention_mask)
        sink(entropy)
        output = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=causal and attention_mask is None,
            scale=scale,
        )
    return output.transpose(1, 2).contiguous(), None
