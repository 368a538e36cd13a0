"""Log probability of target spans given contexts, for many spans in few passes.

    ℓ(target | context) = Σ_j ln softmax(logits at position j − 1)[target_j]

Symbols: span = (context ids, target ids); nats; logits [reads, vocab] in float32.

What this saves over one padded batch through the whole model: shared prefixes are computed once
and short sequences share a row where that pays (``prefix_tree``), batches are sorted by length,
padding is on the right (which under causal attention needs no mask), and the LM head sees only
positions whose next token is scored. A branched tree or a shared row needs a custom attention mask
and explicit positions; where a model cannot take those (an unknown architecture, attention other
than ``sdpa`` or ``eager``, or sequences beyond a sliding window) every sequence is passed on its
own and the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ke_ray.errors import DataError
from ke_ray.evaluation.forward import (
    evaluating,
    logit_rows,
    max_positions,
    plain_model,
    read_logits,
)
from ke_ray.evaluation.prefix_tree import PrefixTree, Span, build_trees, plan_batches
from ke_ray.evaluation.sharing import PASS_OVERHEAD, Workers, share
from ke_ray.models.architectures import can_share_prefixes

_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class SpanScores:
    """Scores of N spans, in the order they were given.

    Attributes:
        logprob_summed: float64 [N], nats.
        num_target_tokens: int64 [N].
        is_greedy: bool [N]: every target token is the model's first choice.
        token_logprobs: float64 [sum of num_target_tokens], span after span.
    """

    logprob_summed: npt.NDArray[np.float64]
    num_target_tokens: npt.NDArray[np.int64]
    is_greedy: npt.NDArray[np.bool_]
    token_logprobs: npt.NDArray[np.float64]


def _content(spans: Sequence[Span]) -> bytes:
    parts = (ids for span in spans for ids in (span.context_ids, span.target_ids))
    return b"".join(np.asarray(ids, dtype=np.int64).tobytes() for ids in parts)


def _can_share(model: Any, longest: int) -> bool:
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        can_share_prefixes(config.model_type)
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and (not window or longest <= window)  # 0: Qwen2-MoE without a window
    )


def _logits(model: Any, batch: Sequence[PrefixTree], device: torch.device) -> Tensor:
    """Logits [reads, vocab] of a batch, read by read, in the model's dtype."""
    width = max(len(tree.tokens) for tree in batch)
    ids = np.zeros((len(batch), width), dtype=np.int64)
    reads: list[int] = []
    for row, tree in enumerate(batch):
        ids[row, : len(tree.tokens)] = tree.tokens
        reads.extend(row * width + node for node in tree.reads)
    arguments: dict[str, Any] = {}
    if not all(tree.is_chain for tree in batch):
        depths = np.zeros((len(batch), width), dtype=np.int64)
        # Padding attends to itself only: a row without any key would be NaN.
        allowed = np.tile(np.eye(width, dtype=np.bool_), (len(batch), 1, 1))
        for row, tree in enumerate(batch):
            size = len(tree.tokens)
            depths[row, :size] = tree.depths
            allowed[row, :size, :size] = tree.allowed()
        mask = torch.from_numpy(allowed)[:, None].to(device)  # [batch, 1, node, node]
        if model.config._attn_implementation == "eager":  # adds its mask to the scores
            low = torch.finfo(model.dtype).min
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, low)
        arguments["attention_mask"] = mask
        arguments["position_ids"] = torch.from_numpy(depths).to(device)
    return read_logits(
        model, torch.from_numpy(ids).to(device), torch.tensor(reads, device=device), **arguments
    )


def _target_logprobs(logits: Tensor, reads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """ln softmax(logits[reads])[tokens] in float32, and whether each is the first choice."""
    logits = logits.float()
    best, choice = logits.max(dim=-1)
    # In place: logits are the largest tensor here, and are not needed afterwards.
    target_logits = logits[reads, tokens]
    total = logits.sub_(best[:, None]).exp_().sum(dim=-1).log_().add_(best)
    return target_logits - total[reads], choice[reads] == tokens


def _cost(batch: Sequence[PrefixTree]) -> int:
    return len(batch) * max(len(tree.tokens) for tree in batch)


def score_spans(
    model: Any,
    spans: Sequence[Span],
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
    workers: Workers | None = None,
) -> SpanScores:
    """Score spans with a causal language model of transformers.

    Args:
        model: on any device, in any dtype; its mode (train, eval) is restored.
        spans: each with at least one context and one target token.
        batch_tokens: the most tokens per forward pass, padding included (a single longer sequence
            or tree still passes); default 2,048 on a CPU and 32,768 on a GPU. Changes speed and
            memory, the result only to rounding.
        share_prefixes: False passes every sequence on its own.
        workers: who shares the passes; all get all scores.

    Raises:
        DataError: a span without context or target, longer than the model, or with an id that the
            model has no embedding for.
    """
    plain = plain_model(model)
    device = next(plain.parameters()).device
    vocab_size = plain.get_input_embeddings().weight.shape[0]
    limit = max_positions(plain)
    longest = 0
    for index, span in enumerate(spans):
        if not span.context_ids or not span.target_ids:
            raise DataError(f"Span {index} needs at least one context and one target token.")
        length = len(span.context_ids) + len(span.target_ids) - 1
        longest = max(longest, length)
        if limit is not None and length > limit:
            raise DataError(f"Span {index} has {length} tokens, and the model takes {limit}.")
        if max(*span.context_ids, *span.target_ids) >= vocab_size:
            raise DataError(
                f"Span {index} has a token id of {vocab_size} or more, and the model has "
                f"{vocab_size} embeddings; use the model's own tokenizer."
            )
    sizes = np.array([len(span.target_ids) for span in spans], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    kind = "cpu" if device.type == "cpu" else "cuda"
    workers = workers or Workers()
    shared = share_prefixes and _can_share(plain, longest)
    trees = build_trees(spans, share=shared)
    batch_tokens = workers.tokens_per_pass(
        sum(len(tree.tokens) for tree in trees), plain, batch_tokens or _BATCH_TOKENS[kind]
    )
    batches = plan_batches(
        trees,
        batch_tokens=batch_tokens,
        batch_reads=logit_rows(device, vocab_size),
        batch_overhead=PASS_OVERHEAD[kind],
        join=shared,
    )
    values: list[Tensor] = []
    first_choices: list[Tensor] = []
    positions: list[int] = []

    def forward(batch: Sequence[PrefixTree]) -> tuple[Tensor, Tensor]:
        offset = 0
        reads: list[int] = []
        tokens: list[int] = []
        for tree in batch:
            reads.extend(offset + read for read, *_ in tree.targets)
            tokens.extend(token for _, token, *_ in tree.targets)
            offset += len(tree.reads)
        return _target_logprobs(
            _logits(plain, batch, device),
            torch.tensor(reads, device=device),
            torch.tensor(tokens, device=device),
        )

    filler = [min(trees, key=lambda tree: len(tree.tokens))] if trees else None
    with evaluating(plain):
        for batch, (value, is_first) in share(
            batches, forward, plain, workers, _cost, filler, content=lambda: _content(spans)
        ):
            for tree in batch:
                positions.extend(
                    int(starts[span]) + position for *_, span, position in tree.targets
                )
            values.append(value)
            first_choices.append(is_first)
    # Log probabilities and first choices; 0 where another worker has them.
    table = torch.zeros(2, int(starts[-1]), dtype=torch.float64)
    if values:
        table[0, positions] = torch.cat(values).double().cpu()
        table[1, positions] = torch.cat(first_choices).double().cpu()
    table = workers.sum(table, device)
    logprobs, greedy = table[0].numpy(), table[1].numpy() > 0
    return SpanScores(
        logprob_summed=np.add.reduceat(logprobs, starts[:-1]) if len(spans) else np.zeros(0),
        num_target_tokens=sizes,
        is_greedy=np.logical_and.reduceat(greedy, starts[:-1]) if len(spans) else greedy,
        token_logprobs=logprobs,
    )
