"""Scoring of a model in memory: one forward pass, per-instance token means, sums per group.

Coefficients are taken by a forward pre-hook on each FFN's second projection and reduced on the
spot, so memory does not grow with layers or instances:

    mean_n = (1/T_n) Σ_t |C_nt|        over the T_n real tokens of instance n

Canonical input is right-padded ids with lengths. Under causal attention a real token never sees
the padding after it, so no attention mask is needed; left padding and holes are first compacted
to the front (real tokens in order, positions from 0).

Only what the measures need is computed. Knowledge entropy needs neither the last layer's second
projection nor the LM head: the pass ends there. Attention entropy comes from the same pass
(``models.attention``), prediction entropy streams the LM head over chunks of tokens
(``core.prediction``).

The forward pass runs in the model's dtype; the reductions run in float32 at least, and sums over
instances in float64 (``core.statistics``; docs/science.md#precision). Departures from the published
code: no padding is counted, nothing but real tokens is averaged, no 1e-9 inside the logarithm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ke_ray.core import intervention
from ke_ray.core.measures import (
    Evaluation,
    check_measures,
    evaluate,
    interventions_of,
    needs_usage,
    required_sums,
)
from ke_ray.core.statistics import GroupSums
from ke_ray.errors import DataError, DeviceMemoryError
from ke_ray.models.capture import Capture
from ke_ray.models.intervention import add_interventions
from ke_ray.models.layout import describe, layers_of
from ke_ray.models.live import evaluation_mode
from ke_ray.models.memory import free_memory, is_out_of_memory, memory_of
from ke_ray.models.sharded import no_gradients

log = logging.getLogger(__name__)

#: Runs batches, given by their first instances: (first instance, means by table) of each.
RunPasses = Callable[
    [Sequence[int], Callable[[int], dict[str, Tensor]]], Iterable[tuple[int, dict[str, Tensor]]]
]


def score_model(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    measures: str | Sequence[str] = ("knowledge_entropy",),
    batch_size: int = 4,
    intervention_instances: int = intervention.NUM_INSTANCES,
    noise_seeds: int = intervention.NUM_SEEDS,
) -> Evaluation:
    """Measure a model in hand.

    Args:
        model: a causal language model of transformers, on any device.
        input_ids: integer [instances, T], tensor or array; padded on either side.
        attention_mask: [instances, T], nonzero at real tokens; ``None``: all are real.
        measures: names of ``ke_ray.core.measures.MEASURES``, or one name.
        batch_size: instances per forward pass; changes speed and memory, not the result.
        intervention_instances: as many instances, evenly spread, for measures by intervention.
        noise_seeds: draws that sensitivity is the mean over.

    Returns:
        Values in their units, with jackknife errors over groups of instances.

    Raises:
        UnsupportedArchitectureError: the model is not in the table of architectures.
        DataError: token ids or shapes that the model cannot take, an instance of padding only.
        UserError: an unknown measure.
    """
    ids, lengths = compact(input_ids, attention_mask)
    sums = score_instances(
        model,
        ids,
        lengths,
        measures=measures,
        num_instances=len(ids),
        batch_size=batch_size,
        intervention_instances=intervention_instances,
        noise_seeds=noise_seeds,
    )
    return evaluate(sums, measures)


def compact(input_ids: Any, attention_mask: Any = None) -> tuple[Tensor, Tensor]:
    """Right-padded ids and lengths from ids with a mask of any pattern.

    Returns:
        ids [instances, T] with the real tokens in front, in order, and lengths int64 [instances].

    Raises:
        DataError: shapes that do not fit.
    """
    ids = _as_tensor(input_ids)
    if attention_mask is None:
        return ids, torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int64)
    real = torch.as_tensor(attention_mask) != 0
    if real.shape != ids.shape:
        raise DataError(
            f"attention_mask has shape {tuple(real.shape)}, expected that of input_ids, "
            f"{tuple(ids.shape)}"
        )
    real = real.to(ids.device)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order), real.sum(dim=1)


def score_instances(
    model: Any,
    input_ids: Any,
    lengths: Any = None,
    *,
    measures: str | Sequence[str],
    num_instances: int,
    group_sizes: Sequence[int] | None = None,
    first_instance: int = 0,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    on_batch: Callable[[int], None] | None = None,
    run_passes: RunPasses | None = None,
    intervention_instances: int = intervention.NUM_INSTANCES,
    noise_seeds: int = intervention.NUM_SEEDS,
    usage: Tensor | None = None,
) -> GroupSums:
    """Sums over a contiguous range of instances of a dataset, ready to merge with others.

    Args:
        model: a causal language model of transformers; its dtype is that of the forward pass.
        input_ids: integer [n, T] right-padded ids; whatever stands in the padding is ignored.
        lengths: integer [n], real tokens of each instance; ``None``: T.
        measures: names of ``MEASURES``; only the sums they need are computed.
        num_instances: size of the whole dataset.
        group_sizes: of its jackknife groups, which are contiguous; None: up to 64 equal ones.
        first_instance: index in the dataset of ``input_ids[0]``.
        batch_size: instances per forward pass. Each batch is cut to its longest instance.
        device: where to run; default: where the model is. The model is not moved.
        on_batch: called after each batch with the number of real tokens it held.
        run_passes: ``(first instances of batches, forward) -> (first instance, means) …`` runs all
            or some of the batches; default: all, in order.
        intervention_instances, noise_seeds: as ``score_model``.
        usage: C̄ that masks go by, from ``mean_usage``; where these are all instances of the
            dataset, it can be left out.

    Returns:
        ``GroupSums`` with the tables the measures need. Values may be NaN or infinite when the
        model's are: the caller decides.

    Raises:
        UnsupportedArchitectureError, DataError, UserError: as ``score_model``.
    """
    chosen = check_measures(measures)
    layouts = describe(model)
    ids, tokens = check_instances(model, input_ids, lengths)
    target = torch.device(device) if device is not None else _device_of(model)
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; expected at least 1")
    if min(intervention_instances, noise_seeds) < 1:
        raise DataError(
            f"intervention_instances is {intervention_instances} and noise_seeds {noise_seeds}; "
            "expected at least 1 each"
        )
    names, layers = required_sums(chosen), layers_of(layouts)
    if {"token_entropies", "expert_load"}.intersection(names) and "coefficients" not in names:
        names = (*names, "coefficients")  # one hook makes all
    if "coefficients" in names and layers.experts and "expert_load" not in names:
        names = (*names, "expert_load")
    sums = GroupSums.empty(
        num_instances,
        names,
        layers=layers,
        d_model=_d_model(model),
        device=target,
        sizes=group_sizes,
    )
    with (
        no_gradients(model),
        evaluation_mode(model),
        Capture(model, layouts, sums.tables, target) as capture,
    ):

        def forward(start: int) -> dict[str, Tensor]:
            part = tokens[start : start + batch_size]
            return capture.run(
                _padded(ids[start : start + batch_size], part).to(target, non_blocking=True),
                part.tolist(),
            )

        starts = range(0, len(ids), batch_size)
        for start, means in (run_passes or _in_order)(starts, forward):
            part = tokens[start : start + batch_size]
            instances = torch.arange(start, start + len(part)) + first_instance
            for name, values in means.items():
                sums.add(name, instances, values)
            sums.count(instances, part)
            if on_batch is not None:
                on_batch(int(part.sum()))
    interventions = interventions_of(chosen)
    if not interventions:
        return sums
    if usage is None and needs_usage(chosen):
        assert len(ids) == num_instances, "masks go by C̄ over all of the dataset"
        usage = mean_usage(
            model, ids, tokens, num_instances=intervention_instances, batch_size=batch_size
        )
    own_ids, own_tokens, instances = _spread(
        ids, tokens, first_instance, intervention_instances, num_instances
    )

    def losses() -> Tensor:
        """Σ_t ℓ_t of the instances on which the model is changed."""
        values = []
        torch.clear_autocast_cache()  # its copies are of the weights before
        with Capture(model, layouts, ("token_nats",), target) as capture:
            for start in range(0, len(own_ids), batch_size):
                part = own_tokens[start : start + batch_size]
                batch = _padded(own_ids[start : start + batch_size], part).to(target)
                values.append(capture.run(batch, part.tolist())["token_nats"])
        return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64, device=target)

    with no_gradients(model), evaluation_mode(model):
        try:
            add_interventions(
                sums,
                interventions,
                model,
                layouts,
                losses=losses,
                predictions=own_tokens - 1,
                instances=instances,
                num_seeds=noise_seeds,
                usage=usage,
            )
        finally:
            torch.clear_autocast_cache()  # of the last changed weights
    return sums


def mean_usage(
    model: Any, input_ids: Any, lengths: Any, *, num_instances: int, batch_size: int
) -> Tensor:
    """C̄ over the instances of a whole dataset on which models are changed.

    Args:
        input_ids, lengths: of the whole dataset.
        num_instances: how many of them, evenly spread.

    Returns:
        float64 [n_layers, widest d_mlp].
    """
    ids, tokens = check_instances(model, input_ids, lengths)
    ids, tokens, _ = _spread(ids, tokens, 0, num_instances, len(ids))
    sums, _ = score_within_memory(
        model,
        ids,
        tokens,
        measures="knowledge_entropy",
        num_instances=len(ids),
        batch_size=batch_size,
    )
    return sums.mean("coefficients")


def _spread(
    ids: Tensor, tokens: Tensor, first: int, num_chosen: int, num_instances: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of these instances on which models are changed, and their indices in the dataset."""
    indices = range(first, first + len(ids))
    chosen = torch.tensor([intervention.is_chosen(i, num_chosen, num_instances) for i in indices])
    return ids[chosen], tokens[chosen], torch.tensor(indices)[chosen]


def _padded(ids: Tensor, lengths: Tensor) -> Tensor:
    """Instances [B, T], cut to the longest, on the CPU."""
    longest = int(lengths.max())
    padding = torch.arange(longest)[None, :] >= lengths[:, None]
    # Any valid id will do behind the last real token: nothing looks at it.
    return ids[:, :longest].to(torch.int64).masked_fill(padding, 0)


def _in_order(
    starts: Sequence[int], forward: Callable[[int], dict[str, Tensor]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    for start in starts:
        yield start, forward(start)


def score_within_memory(
    model: Any, input_ids: Any, lengths: Any, *, batch_size: int, **keys: Any
) -> tuple[GroupSums, int]:
    """``score_instances``; where memory runs out, again from the start with half the batch.

    Returns:
        The sums, and the batch size that they were formed with, for the next call.

    Raises:
        DeviceMemoryError: a batch of one instance does not fit.
    """
    device = next(model.parameters()).device
    while True:
        try:
            sums = score_instances(model, input_ids, lengths, batch_size=batch_size, **keys)
            return sums, batch_size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        # Outside the handler: its traceback keeps the failed batch's tensors alive.
        free_memory(device)
        if batch_size == 1:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            raise DeviceMemoryError(
                f"One instance of {input_ids.shape[1]:,} tokens does not fit beside "
                f"{weights / 1e9:.2f} GB of weights: {memory_of(device)} ({reason}). Use a device "
                "with more memory, dtype bfloat16, shorter instances (sequence_length) or fewer "
                "scorers (num_actors)."
            )
        batch_size = batch_size // 2
        log.warning("Out of memory (%s); going on with batches of %d.", reason, batch_size)


def check_instances(model: Any, input_ids: Any, lengths: Any = None) -> tuple[Tensor, Tensor]:
    """Ids and lengths on the CPU, known to be within the model's vocabulary and positions.

    Raises:
        DataError: they are not, or an instance has no real token.
    """
    ids = _as_tensor(input_ids).cpu()
    width = ids.shape[1]
    if lengths is None:
        tokens = torch.full((len(ids),), width, dtype=torch.int64)
    else:
        tokens = torch.tensor(lengths) if not isinstance(lengths, Tensor) else lengths.cpu()
        tokens = tokens.to(torch.int64)
    if tokens.shape != (len(ids),) or bool(((tokens < 1) | (tokens > width)).any()):
        raise DataError(
            f"lengths {tokens.tolist()[:8]}… do not fit {len(ids)} instances of up to {width} "
            "tokens: each instance needs one length between 1 and its width (an instance of "
            "padding only has no mean over tokens)"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and int(tokens.max()) > positions:
        raise DataError(
            f"an instance has {int(tokens.max())} tokens but the model has {positions} positions; "
            "use a shorter sequence length"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    real = torch.arange(width)[None, :] < tokens[:, None]
    outside = real & ((ids < 0) | (ids >= vocabulary))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise DataError(
            f"token id {int(ids[row, column])} (instance {row}, position {column}) is outside the "
            f"model's vocabulary of {vocabulary}; the data were tokenised for another model"
        )
    return ids, tokens


def _as_tensor(input_ids: Any) -> Tensor:
    ids = input_ids if isinstance(input_ids, Tensor) else torch.tensor(input_ids)
    if ids.ndim != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise DataError(
            f"input_ids has shape {tuple(ids.shape)} and type {ids.dtype}; expected whole numbers "
            "of shape [instances, tokens], at least one of each"
        )
    return ids


def _d_model(model: Any) -> int:
    """Width of the final hidden states; OPT-350m projects them."""
    return int(getattr(model.config, "word_embed_proj_dim", None) or model.config.hidden_size)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
