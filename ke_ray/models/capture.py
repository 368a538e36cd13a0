"""Hooks that reduce coefficients and entropies to per-instance token means as a model runs.

    coefficients        input of the FFN's second projection, C                  [batch, pos, d_mlp]
    coefficients_relu   |ReLU(gate) · up|; ReLU(up) of an ungated FFN (A.2 of arXiv 2410.01380):
                        from the outputs of the gate and up projections, which are only looked at
    attention_entropy   from the queries and keys of each layer (``models.attention``)
    next_token_entropy  from the final hidden states, through the LM head in chunks of tokens
    expert_load         of a mixture of experts, with its coefficients (``models.experts``)

Nothing is kept but one mean per instance and layer. When the last layer has run as far as the
measures need, an exception that never leaves this module ends the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ke_ray.core.coefficients import TokenMean, accumulation_dtype
from ke_ray.core.prediction import streamed_entropy
from ke_ray.models.architectures import FFNLayout
from ke_ray.models.attention import measure_attention
from ke_ray.models.experts import MixtureLayout, RoutedRows, measure_experts
from ke_ray.models.loading import require_head


class _Finished(Exception):  # noqa: N818 - ends a forward pass, it is no error
    """Every hook has run; the rest of the forward pass is not needed."""


class _FFN(NamedTuple):
    """A dense FFN: that of a layer, or the shared expert of a mixture.

    ``memories`` is its part of the layer's coefficients, ``weight`` what they are multiplied by,
    [batch, pos, 1]; ``None``: by one.
    """

    layer: int
    layout: FFNLayout
    memories: slice
    weight: Callable[[], Tensor] | None = None
    is_shared: bool = False


class Capture:
    """Hooks on one model, and the per-instance means of the batch under way."""

    def __init__(
        self,
        model: Any,
        layouts: Sequence[FFNLayout | MixtureLayout],
        names: Collection[str],
        device: torch.device,
    ) -> None:
        self.body = model.base_model
        self.model = model
        self.layouts = layouts
        self.device = device
        self.coefficients = "coefficients" in names
        self.relu = "coefficients_relu" in names
        self.attention = "attention_entropy" in names
        self.prediction = "next_token_entropy" in names
        self.head = _language_head(model) if self.prediction else None
        self.load = "expert_load" in names
        self.lengths: list[int] = []
        self.width = 0  # positions of the batch
        self.values: dict[str, Tensor] = {}
        self.last_layer: set[tuple[str, bool]] = set()
        self.gate_output: Tensor | None = None
        self.shared_weight: Tensor | None = None
        self.mean = TokenMean()
        self.stack = ExitStack()

    def __enter__(self) -> Capture:
        try:
            if self.coefficients or self.relu:
                for layer, layout in enumerate(self.layouts):
                    self._hook_layer(layer, layout)
                self.stack.enter_context(measure_experts(self.model, self.layouts, self))
            if self.attention:
                self.stack.enter_context(
                    measure_attention(self.model, self.layouts, self._see_attention)
                )
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def run(self, batch: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        """Per-instance means by table: [B, n_layers, d_mlp], [B, n_layers] or [B]."""
        self.lengths, self.width = lengths, batch.shape[1]
        n_layers, d_mlp = len(self.layouts), max(layout.d_mlp for layout in self.layouts)
        dtype = accumulation_dtype(next(self.body.parameters()).dtype)
        shape = (len(lengths), n_layers)
        self.values = {}
        self.last_layer = set()
        last = self.layouts[-1]
        for name, is_requested in (
            ("coefficients", self.coefficients),
            ("coefficients_relu", self.relu),
        ):
            if is_requested:
                self.values[name] = torch.zeros((*shape, d_mlp), dtype=dtype, device=self.device)
                self.last_layer.add((name, False))
                if isinstance(last, MixtureLayout) and last.shared is not None:
                    self.last_layer.add((name, True))
        if self.load:
            self.values["expert_load"] = self._load_of_dense(shape)
        if self.attention:
            self.values["attention_entropy"] = torch.zeros(
                shape, dtype=torch.float64, device=self.device
            )
            self.last_layer.add(("attention_entropy", False))
        try:
            hidden = self.body(input_ids=batch, use_cache=False).last_hidden_state
        except _Finished:
            return self.values
        if self.head is not None:
            self.values["next_token_entropy"] = self._predict(hidden)
        return self.values

    def _seen(self, name: str, layer: int, is_shared: bool = False) -> None:
        if layer == len(self.layouts) - 1:
            self.last_layer.discard((name, is_shared))
            if not self.last_layer and not self.prediction:
                raise _Finished

    def _hook_layer(self, layer: int, layout: FFNLayout | MixtureLayout) -> None:
        ffn = None
        if isinstance(layout, FFNLayout):
            ffn = _FFN(layer, layout, slice(0, layout.d_mlp))
        elif layout.shared is not None:
            memories = slice(sum(layout.routed_sizes), layout.d_mlp)
            gate = layout.shared_gate
            weight = None if gate is None else self._hook_shared_gate(layout.ffn, gate)
            ffn = _FFN(layer, layout.shared, memories, weight, is_shared=True)
        if ffn is not None and self.coefficients:
            self._hook_input(ffn)
        if ffn is not None and self.relu:
            self._hook_relu(ffn)

    def _hook_shared_gate(self, block: nn.Module, gate: nn.Module) -> Callable[[], Tensor]:
        """The weight of a shared expert, computed before the block that uses it later."""

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.shared_weight = torch.sigmoid(gate(inputs[0]))

        def weight() -> Tensor:
            assert self.shared_weight is not None
            return self.shared_weight

        self._keep(block.register_forward_pre_hook(before))
        return weight

    def _hook_input(self, ffn: _FFN) -> None:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for n, (rows,) in self._instances(*self._weighted(ffn, inputs[0])):
                target = self.values["coefficients"][n, ffn.layer, ffn.memories]
                target.copy_(self.mean.magnitude(rows))
            self._seen("coefficients", ffn.layer, ffn.is_shared)

        self._keep(ffn.layout.second_projection.register_forward_pre_hook(before))

    def _hook_relu(self, ffn: _FFN) -> None:
        """|ReLU(gate's pre-activation) · up|, or ReLU(pre-activation) of an ungated FFN."""
        layout = ffn.layout

        def after_gate(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.gate_output = output  # gone as soon as `up` has run

        def after_up(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            gate, up = self.gate_output, output
            self.gate_output = None
            if layout.fused == "gate_up":
                gate, up = output.chunk(2, dim=-1)
            pair = (gate, up) if layout.gated else (up,)
            for n, rows in self._instances(*self._weighted(ffn, *pair)):
                target = self.values["coefficients_relu"][n, ffn.layer, ffn.memories]
                target.copy_(self.mean.rectified(*rows))
            self._seen("coefficients_relu", ffn.layer, ffn.is_shared)

        if layout.gate is not None and layout.fused is None:
            self._keep(layout.gate.register_forward_hook(after_gate))
        self._keep(layout.up.register_forward_hook(after_up))

    def _weighted(self, ffn: _FFN, *factors: Tensor | None) -> Iterator[Tensor | None]:
        """Factors of the coefficients, [batch, pos, …], the last one with the expert's weight."""
        for number, factor in enumerate(factors, start=1):
            if factor is not None and factor.ndim == 2:  # Qwen2-MoE puts all tokens in one axis
                factor = factor.view(len(self.lengths), self.width, -1)
            if factor is not None and ffn.weight is not None and number == len(factors):
                factor = factor * ffn.weight()
            yield factor

    def is_real(self) -> Tensor:
        """bool [batch · pos]: whether a token of the batch is real."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return (torch.arange(self.width, device=self.device) < lengths[:, None]).flatten()

    def needs_output(self, layer: int) -> bool:
        """Whether anything is measured behind this layer's experts."""
        return self.prediction or layer < len(self.layouts) - 1

    def see_expert(self, layer: int, rows: RoutedRows) -> None:
        """Add one expert: c = g_e · |C|, averaged over all real tokens of each instance."""
        layout = self.layouts[layer]
        assert isinstance(layout, MixtureLayout)
        instances = rows.tokens // self.width
        lengths = torch.tensor(self.lengths, dtype=torch.float64, device=self.device)
        share = torch.zeros(
            (len(self.lengths), len(instances)), dtype=torch.float64, device=self.device
        )
        share[instances, torch.arange(len(instances), device=self.device)] = 1 / lengths[instances]
        if self.load:
            self.values["expert_load"][:, layer, rows.expert] = share.sum(dim=1)
        share *= rows.weights
        size = layout.routed_sizes[rows.expert]
        memories = slice(rows.expert * size, (rows.expert + 1) * size)
        if self.coefficients:
            target = self.values["coefficients"][:, layer, memories]
            target.copy_(share.to(target.dtype) @ rows.coefficients.to(target.dtype).abs())
        if self.relu:
            gate, up = layout.gate_and_up(rows.gate_up)
            target = self.values["coefficients_relu"][:, layer, memories]
            inside = gate.clamp_min(0.0).to(target.dtype).mul_(up).abs_()
            target.copy_(share.to(target.dtype) @ inside)

    def seen_experts(self, layer: int) -> None:
        """All routed experts of the layer have been added."""
        for name in ("coefficients", "coefficients_relu"):
            if name in self.values:
                self._seen(name, layer)

    def _load_of_dense(self, shape: tuple[int, int]) -> Tensor:
        """[batch, n_layers, n_experts]: 1 for dense layers and shared experts, 0 for the others."""
        sizes = [layout.expert_sizes for layout in self.layouts]
        load = torch.zeros((*shape, max(map(len, sizes))), dtype=torch.float64, device=self.device)
        for layer, layout in enumerate(self.layouts):
            if isinstance(layout, FFNLayout) or layout.shared is not None:
                load[:, layer, len(sizes[layer]) - 1] = 1.0
        return load

    def _keep(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def _instances(self, *tensors: Tensor | None) -> Iterator[tuple[int, list[Tensor]]]:
        """Per instance n: its index and the real rows [T_n, …] of each tensor that is given."""
        for n, length in enumerate(self.lengths):
            yield n, [tensor[n, :length] for tensor in tensors if tensor is not None]

    def _see_attention(self, layer: int, entropy: Tensor) -> None:
        per_token = entropy.mean(dim=1, dtype=torch.float64)  # [batch, pos]
        self.values["attention_entropy"][:, layer] = self._token_mean(per_token)
        self._seen("attention_entropy", layer)

    def _predict(self, hidden: Tensor) -> Tensor:
        assert self.head is not None
        real = torch.cat([hidden[n, :length] for n, length in enumerate(self.lengths)])
        entropy = streamed_entropy(real, self.head, self.model.config.vocab_size)
        return torch.stack([part.mean() for part in entropy.split(self.lengths)])

    def _token_mean(self, per_token: Tensor) -> Tensor:
        return torch.stack([per_token[n, :length].mean() for n, length in enumerate(self.lengths)])


def _language_head(model: Any) -> Callable[[Tensor], Tensor]:
    projection = require_head(model, "next_token_entropy")
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        if softcap is not None:
            logits = logits.float() if logits.dtype != torch.float64 else logits
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        return logits

    return head
