"""Held-out perplexity: a second, cheap measure of forgetting beside downstream accuracy.

    nats per token = −(1/N) Σ ln P(x_t | x_<t)        over all predicted tokens of all rows
    perplexity     = exp(nats per token)

The first token of a row is not predicted, nor is padding. Sum and count are separate and divided
once, so rows of any length weigh by their tokens. Cross-entropy is computed in float32 over chunks
of positions, and a pass takes as many rows as keep its logits small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ke_ray.errors import DataError
from ke_ray.evaluation.forward import (
    evaluating,
    logit_rows,
    max_positions,
    plain_model,
    read_logits,
)
from ke_ray.evaluation.sharing import Workers, share

#: Positions of one cross-entropy call; its float32 copies of the logits stay small.
_CHUNK = 256


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a corpus.

    Attributes:
        nats_per_token: mean negative log likelihood.
        num_tokens: predicted tokens.
    """

    nats_per_token: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def row(self) -> dict[str, Any]:
        """A row of ``perplexity.parquet``: perplexity, nats_per_token, num_tokens."""
        return {
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "num_tokens": self.num_tokens,
        }


def held_out_perplexity(
    model: Any,
    input_ids: Any,
    lengths: Any = None,
    *,
    batch_size: int = 8,
    workers: Workers | None = None,
) -> Perplexity:
    """Perplexity of right-padded rows.

    Args:
        model: a causal language model of transformers; its mode (train, eval) is restored.
        input_ids: integer [rows, T], array or tensor.
        lengths: [rows] real tokens of each row; None: all T.
        batch_size: rows of a forward pass at most; changes speed and memory, not the result.
        workers: who shares the passes; all get the result.

    Raises:
        DataError: shapes that do not fit, ids beyond the embedding, rows longer than the model, or
            nothing to predict.
    """
    plain = plain_model(model)
    device = next(plain.parameters()).device
    ids = torch.as_tensor(input_ids)
    if ids.ndim != 2 or ids.shape[0] == 0:
        raise DataError(f"Token ids have shape {tuple(ids.shape)}; expected [rows, T].")
    sizes = torch.full((len(ids),), ids.shape[1]) if lengths is None else torch.as_tensor(lengths)
    if sizes.shape != (len(ids),) or int(sizes.max()) > ids.shape[1]:
        raise DataError(
            f"Lengths of shape {tuple(sizes.shape)} do not fit token ids {tuple(ids.shape)}."
        )
    limit = max_positions(plain)
    if limit is not None and int(sizes.max()) - 1 > limit:
        raise DataError(f"A row has {int(sizes.max())} tokens, and the model takes {limit}.")
    vocab_size = plain.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise DataError(
            f"Token ids reach {int(ids.max())}, and the model has {vocab_size} embeddings; use the "
            "model's own tokenizer."
        )
    workers = workers or Workers()
    rows_at_once = max(1, min(batch_size, logit_rows(device, vocab_size) // ids.shape[1]))
    rows_at_once = workers.rows_per_pass(len(ids), rows_at_once)

    def width_of(rows: range) -> int:
        return int(sizes[rows.start : rows.stop].max())

    def forward(rows: range) -> tuple[list[Tensor], int]:
        size, width = sizes[rows.start : rows.stop], width_of(rows)
        is_real = (torch.arange(1, width) < size[:, None]).flatten()  # [rows · (width - 1)]
        batch = ids[rows.start : rows.stop, :width].long().to(device)
        reads = is_real.nonzero().flatten().to(device)
        logits = read_logits(plain, batch[:, :-1], reads)
        targets = batch[:, 1:].flatten()[reads]
        chunks = zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
        nats = [cross_entropy(part.float(), labels, reduction="sum") for part, labels in chunks]
        return nats, len(targets)

    starts = range(0, len(ids), rows_at_once)
    passes = [range(start, min(start + rows_at_once, len(ids))) for start in starts]
    # A row of one token predicts nothing.
    passes = [rows for rows in passes if width_of(rows) > 1]
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats and tokens
    with evaluating(plain):
        results = share(
            passes,
            forward,
            plain,
            workers,
            lambda rows: len(rows) * width_of(rows),
            content=lambda: ids.numpy().tobytes(),
        )
        for _, (nats, count) in results:
            for part in nats:
                sums[0] += part.double()
            sums[1] += count
    total, num_tokens = workers.sum(sums, device).tolist()
    if num_tokens == 0:
        raise DataError("There is no token to predict; rows need at least two tokens.")
    return Perplexity(total / num_tokens, int(num_tokens))
