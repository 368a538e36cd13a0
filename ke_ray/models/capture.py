"""Hooks that reduce coefficients and entropies to per-instance token means as a model runs.

    coefficients        input of the FFN's second projection, C                  [batch, pos, d_mlp]
    coefficients_relu   |ReLU(gate) · up|; ReLU(up) of an ungated FFN (A.2 of arXiv 2410.01380):
                        from the outputs of the gate and up projections, which are only looked at
    token_entropies     of the same coefficients, token by token (``core.token_entropy``)
    attention_entropy   from the queries and keys of each layer (``models.attention``)
    next_token_entropy, token_nats
                        from the final hidden states, through the LM head in chunks of tokens
    predictions         from the lengths alone
    a measure's own     from the rows of one instance, at one of two taps (``core.sums``)
    expert_load         of a mixture of experts, with its coefficients (``models.experts``)

Nothing is kept but one mean per instance and layer. When the last layer has run as far as the
measures need, an exception that never leaves this module ends the forward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ke_ray.core.coefficients import TokenMean, accumulation_dtype
from ke_ray.core.precision import matmul_precision
from ke_ray.core.prediction import streamed_entropy
from ke_ray.core.sums import OF_LOGITS, SUMS, Sum
from ke_ray.core.token_entropy import TokenEntropies
from ke_ray.errors import UnsupportedArchitectureError, UserError
from ke_ray.models.attention import measure_attention
from ke_ray.models.experts import RoutedRows, measure_experts
from ke_ray.models.language_head import language_head
from ke_ray.models.layout import FFNLayout, layers_of
from ke_ray.models.sharded import is_sharded, run_whole


class _Finished(Exception):  # noqa: N818 - ends a forward pass, it is no error
    """Every hook has run; the rest of the forward pass is not needed."""


class Capture:
    """Hooks on one model, and the per-instance means of the batch under way."""

    def __init__(
        self, model: Any, layouts: Sequence[FFNLayout], names: Collection[str], device: torch.device
    ) -> None:
        self.body = model.base_model
        self.model = model
        self.layouts = layouts
        self.device = device
        self.names = frozenset(names)
        self.coefficients = "coefficients" in names
        self.relu = "coefficients_relu" in names
        self.of_tokens = "token_entropies" in names  # with the coefficients, in one hook
        self.attention = "attention_entropy" in names
        self.prediction = bool(self.names.intersection(OF_LOGITS))
        self.head = language_head(model, names) if self.prediction else None
        self.load = "expert_load" in names
        own = [SUMS[name] for name in SUMS if name in names]
        self.of_rows = [each for each in own if each.tap == "coefficients"]
        self.of_hidden = [each for each in own if each.tap == "hidden"]
        self.needs_streams = _check_streams(self.of_hidden, len(layouts))
        self.needs_body = self.prediction or bool(self.of_hidden)
        self.is_sharded = is_sharded(model)
        assert not (self.is_sharded and self.needs_body), "training measures coefficients alone"
        self.lengths: list[int] = []
        self.width = 0  # positions of the batch
        self.values: dict[str, Tensor] = {}
        self.layers = layers_of(layouts)
        by_layer = {"coefficients", "coefficients_relu", "attention_entropy"}
        self.expected = {
            (name, layer)
            for name in by_layer.intersection(names).union(each.name for each in self.of_rows)
            for layer in range(len(layouts))
            if not self.layers.absence(name, layer)
        }
        for layer, layout in enumerate(layouts):
            if layout.experts is None:
                continue
            for name in {"coefficients", "coefficients_relu"}.intersection(names):
                self.expected.add((f"{name} of experts", layer))
                if layout.second_projection is None:  # no shared expert
                    self.expected.discard((name, layer))
        self.unseen: set[tuple[str, int]] = set()
        self.gate_pair: dict[str, Tensor] = {}
        self.shared_weight: Tensor | None = None  # [batch, pos, 1]; None: one
        self.mean = TokenMean()
        self.tokens: tuple[int, TokenEntropies] | None = None  # of the layer under way
        self.stack = ExitStack()

    def __enter__(self) -> Capture:
        try:
            for layer, layout in enumerate(self.layouts):
                if layout.second_projection is None:
                    continue
                if layout.experts is not None and layout.experts.shared_gate is not None:
                    self._hook_shared_gate(layout.experts.block, layout.experts.shared_gate)
                if self.coefficients or (self.of_rows and layout.experts is None):
                    self._hook_input(layer, layout.second_projection)
                if self.relu:
                    self._hook_relu(layer, layout)
            if self.coefficients or self.relu:
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
        n_layers, d_mlp = len(self.layouts), max(self.layers.d_mlp)
        dtype = accumulation_dtype(next(self.body.parameters()).dtype)
        shape = (len(lengths), n_layers)
        self.values, self.tokens = {}, None
        self.unseen = set(self.expected)
        for name in {"coefficients", "coefficients_relu"}.intersection(self.names):
            self.values[name] = torch.zeros((*shape, d_mlp), dtype=dtype, device=self.device)
        for name in {"token_entropies", "attention_entropy"}.intersection(self.names):
            self.values[name] = torch.zeros(shape, dtype=torch.float64, device=self.device)
        for own in self.of_rows:
            widest = (d_mlp,) * len(own.axes)
            self.values[own.name] = torch.zeros(
                (*shape, *widest), dtype=torch.float64, device=self.device
            )
        if "predictions" in self.names:
            counts = torch.tensor(lengths, dtype=torch.float64, device=self.device)
            self.values["predictions"] = counts - 1
        if self.load:
            self.values["expert_load"] = self._load_of_unrouted(shape)
        if not self.unseen and not self.needs_body:
            return self.values  # no layer has what was asked for
        try:
            if self.is_sharded:
                run_whole(self.model, batch)
            else:
                output = self.body(
                    input_ids=batch, use_cache=False, output_hidden_states=self.needs_streams
                )
                hidden = output.last_hidden_state
        except _Finished:
            return self.values
        if self.unseen:
            name, layer = min(self.unseen)
            raise UnsupportedArchitectureError(
                f"{name} of layer {layer} never came by: {type(self.model).__name__} does not call "
                "the modules that its row or description names (BLOOM's slow_but_exact must be "
                "false; an attention that does not use transformers' interface may return its "
                "rows: returns_attention)."
            )
        for own in self.of_hidden:
            states = hidden if own.layer is None else output.hidden_states[own.layer + 1]
            parts = [_own_value(own, rows) for _, (rows,) in self._instances(states)]
            self.values[own.name] = torch.stack(parts)
        if self.head is not None:
            self._predict(hidden, batch)
        return self.values

    def _seen(self, name: str, layer: int) -> None:
        self.unseen.discard((name, layer))
        if not self.unseen and not self.needs_body and not self.is_sharded:
            raise _Finished

    def _add(self, name: str, layer: int, means: Iterator[tuple[int, Tensor]]) -> None:
        last = self.layouts[layer].d_mlp  # behind the routed experts, in a mixture
        for n, mean in means:
            self.values[name][n, layer, last - mean.numel() : last] = mean
        self._seen(name, layer)

    def _add_own(self, layer: int, coefficients: Tensor) -> None:
        """Sums that measures brought along."""
        width = self.layouts[layer].d_mlp
        for own in self.of_rows:
            for n, (rows,) in self._instances(coefficients):
                value = _own_value(own, rows)
                expected = (width,) * len(own.axes)
                if tuple(value.shape) != expected:
                    raise UserError(
                        f"sum {own.name!r} of an instance has shape {tuple(value.shape)} at layer "
                        f"{layer}; expected {expected}, by its axes {own.axes}"
                    )
                target = self.values[own.name][n, layer]
                (target[:width] if own.axes else target).copy_(value)
            self._seen(own.name, layer)

    def _hook_shared_gate(self, block: nn.Module, gate: nn.Module) -> None:
        """The weight of a shared expert, computed before the block that uses it later."""

        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.shared_weight = torch.sigmoid(gate(inputs[0]))

        self._keep(block.register_forward_pre_hook(before))

    def _hook_input(self, layer: int, projection: nn.Module) -> None:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            weighted = self._weighted(layer, inputs[0])
            if self.of_tokens:
                tokens = self._tokens(layer)
                for n, (own,) in self._instances(weighted):
                    tokens.add(slice(n * self.width, n * self.width + len(own)), own)
                self._add_tokens(layer)
            if self.layouts[layer].experts is None:
                self._add_own(layer, weighted)
            if not self.coefficients:
                return
            rows = self._instances(weighted)
            self._add("coefficients", layer, ((n, self.mean.magnitude(own)) for n, (own,) in rows))

        self._keep(projection.register_forward_pre_hook(before))

    def _hook_relu(self, layer: int, layout: FFNLayout) -> None:
        """|ReLU(gate's pre-activation) · up|, or ReLU(pre-activation) of an ungated FFN."""

        def finish(*pair: Tensor) -> None:
            rows = self._instances(*pair[:-1], self._weighted(layer, pair[-1]))
            self._add("coefficients_relu", layer, ((n, self.mean.rectified(*r)) for n, r in rows))

        def of_pair(part: str, values: Tensor) -> None:
            self.gate_pair[part] = values  # gone as soon as the other has run
            if len(self.gate_pair) == 2:
                finish(self.gate_pair.pop("gate"), self.gate_pair.pop("up"))

        def after_gate(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            of_pair("gate", output)

        def before_activation(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            of_pair("gate", inputs[0])

        def after_up(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if layout.fused == "gate_up":
                finish(*output.chunk(2, dim=-1))
            elif layout.gated:
                of_pair("up", output)
            else:
                finish(output)

        assert layout.up is not None
        self._keep(layout.up.register_forward_hook(after_up))
        if layout.pre_activation is not None:
            self._keep(layout.pre_activation.register_forward_pre_hook(before_activation))
        elif layout.gate is not None and layout.fused is None:
            self._keep(layout.gate.register_forward_hook(after_gate))

    def _weighted(self, layer: int, values: Tensor) -> Tensor:
        """Values of the layer's FFN times its weight, where it is a shared expert with a gate."""
        experts = self.layouts[layer].experts
        if experts is None or experts.shared_gate is None:
            return values
        assert self.shared_weight is not None
        return values * self.shared_weight.view(*values.shape[:-1], 1)

    def is_real(self) -> Tensor:
        """bool [batch · pos]: whether a token of the batch is real."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return (torch.arange(self.width, device=self.device) < lengths[:, None]).flatten()

    def needs_output(self, layer: int) -> bool:
        """Whether anything is measured behind this layer."""
        return self.needs_body or any(other > layer for _, other in self.unseen)

    @matmul_precision("highest")
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def see_expert(self, layer: int, rows: RoutedRows) -> None:
        """Add one expert: c = g_e · |C|, averaged over all real tokens of each instance."""
        experts = self.layouts[layer].experts
        assert experts is not None
        instances = rows.tokens // self.width
        lengths = torch.tensor(self.lengths, dtype=torch.float64, device=self.device)
        share = lengths.new_zeros((len(lengths), len(instances)))
        share[instances, torch.arange(len(instances), device=self.device)] = 1 / lengths[instances]
        if self.load:
            self.values["expert_load"][:, layer, rows.expert] = share.sum(dim=1)
        share *= rows.weights
        size = experts.sizes[rows.expert]
        memories = slice(rows.expert * size, (rows.expert + 1) * size)
        if self.coefficients:
            target = self.values["coefficients"][:, layer, memories]
            target.copy_(share.to(target.dtype) @ rows.coefficients.to(target.dtype).abs())
        if self.of_tokens:
            self._tokens(layer).add(rows.tokens, rows.coefficients, rows.weights)
        if self.relu:
            gate, up = experts.gate_and_up(rows.gate_up)
            target = self.values["coefficients_relu"][:, layer, memories]
            inside = gate.clamp_min(0.0).to(target.dtype).mul_(up).abs_()
            target.copy_(share.to(target.dtype) @ inside)

    def seen_experts(self, layer: int) -> None:
        """All routed experts of the layer have been added."""
        if self.of_tokens:
            self._add_tokens(layer)
        for name in ("coefficients", "coefficients_relu"):
            if name in self.values:
                self._seen(f"{name} of experts", layer)

    def _tokens(self, layer: int) -> TokenEntropies:
        """The entropies of the layer's tokens, which its routed and shared experts add to."""
        if self.tokens is None or self.tokens[0] != layer:
            size = len(self.lengths) * self.width
            self.tokens = (layer, TokenEntropies(size, self.device))
        return self.tokens[1]

    def _add_tokens(self, layer: int) -> None:
        """Routed and shared experts come in either order: whichever is last has them all."""
        per_token = self._tokens(layer).weighted().view(len(self.lengths), self.width)
        self.values["token_entropies"][:, layer] = self._token_mean(per_token)

    def _load_of_unrouted(self, shape: tuple[int, int]) -> Tensor:
        """[batch, n_layers, n_experts]: 1 for dense layers and shared experts, 0 for the others."""
        sizes = [layout.expert_sizes for layout in self.layouts]
        load = torch.zeros((*shape, max(map(len, sizes))), dtype=torch.float64, device=self.device)
        for layer, layout in enumerate(self.layouts):
            if layout.second_projection is not None:
                load[:, layer, len(sizes[layer]) - 1] = 1.0
        return load

    def _keep(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def _instances(self, *tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Per instance n: its index and the real rows [T_n, …] of each tensor.

        Tensors are [batch, pos, d_mlp], or [batch · pos, d_mlp] (OPT).
        """
        batches = [tensor.view(len(self.lengths), -1, tensor.shape[-1]) for tensor in tensors]
        for n, length in enumerate(self.lengths):
            yield n, [tensor[n, :length] for tensor in batches]

    def _see_attention(self, layer: int, entropy: Tensor) -> None:
        per_token = entropy.mean(dim=1, dtype=torch.float64)  # [batch, pos]
        self.values["attention_entropy"][:, layer] = self._token_mean(per_token)
        self._seen("attention_entropy", layer)

    def _predict(self, hidden: Tensor, batch: Tensor) -> None:
        assert self.head is not None
        real = torch.cat([hidden[n, :length] for n, length in enumerate(self.lengths)])
        vocabulary = self.model.config.vocab_size
        if "token_nats" not in self.names:
            entropy = streamed_entropy(real, self.head, vocabulary)
        else:
            following = batch.roll(-1, dims=1)  # behind the last real token stands any valid id
            targets = [following[n, :length] for n, length in enumerate(self.lengths)]
            entropy, nats = streamed_entropy(real, self.head, vocabulary, torch.cat(targets))
            losses = [own[:-1].sum() for own in nats.split(self.lengths)]
            self.values["token_nats"] = torch.stack(losses)
        if "next_token_entropy" in self.names:
            means = [own.mean() for own in entropy.split(self.lengths)]
            self.values["next_token_entropy"] = torch.stack(means)

    def _token_mean(self, per_token: Tensor) -> Tensor:
        return torch.stack([per_token[n, :length].mean() for n, length in enumerate(self.lengths)])


def _own_value(own: Sum, rows: Tensor) -> Tensor:
    """What a measure's own sum adds for one instance; it gets a copy, and may do as it likes."""
    return own.of_instance(rows.to(accumulation_dtype(rows.dtype), copy=True))


def _check_streams(sums: Sequence[Sum], n_layers: int) -> bool:
    """Whether the residual stream between layers is needed.

    Raises:
        UserError: behind a layer that has no other after it.
    """
    layers = [own.layer for own in sums if own.layer is not None]
    if layers and max(layers) >= n_layers - 1:
        raise UserError(
            f"the residual stream behind layer {max(layers)} was requested of a model with "
            f"{n_layers} layers; expected a layer from 0 to {n_layers - 2} (behind the last one "
            "stand the final hidden states, of rank_me and alpha_req without a layer)"
        )
    return bool(layers)
