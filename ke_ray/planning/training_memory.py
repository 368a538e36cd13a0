"""Memory that training takes, by arithmetic from the sizes of a model and a study's settings.

With P parameters on W workers, in bytes per worker::

    weights    4 P     float32                     4 P / W  sharded (fsdp)
    gradients  4 P     float32                     4 P / W, and a layer's and the rest's in full
    moments    8 P     AdamW's two, float32        8 P / W
    gathered   —                                   the rest and a layer in the compute dtype
    copies     2 P     bfloat16, of products       —        (gathered in bfloat16 already)

"The rest" are the parameters outside the decoder layers. What the backward pass needs of the
forward pass grows with the tokens of a micro-batch; with activation checkpointing it is the input
of every layer, and one layer in full. Logits are those of ``LOGITS_AT_ONCE`` (training.loss).

``tests/planning/test_training_memory.py`` compares the sums with PyTorch's own tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ke_ray.studies.training import LOGITS_AT_ONCE, TrainingSettings

#: A suggestion leaves this share of a device's memory free.
_MARGIN = 0.1
#: Workers of a suggestion, at most.
_MAX_WORKERS = 64
_FLOAT32 = 4


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model under the precision and strategy it is trained with.

    Attributes:
        num_parameters: P; tied ones once.
        in_layers: of these, in decoder layers.
        has_plain_head: its logits are a product and nothing else, and need not be whole.
        saved_bytes: what one row of T tokens leaves for the backward pass, all layers together;
            None where it is not known.
        copied_bytes: the weights' copies in bfloat16 that autocast makes, without the head's.
    """

    num_parameters: int
    in_layers: int
    n_layers: int
    d_model: int
    vocab_size: int
    has_plain_head: bool
    saved_bytes: int | None
    copied_bytes: int


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes per worker, on its device and in host memory.

    Attributes:
        copies: weights in bfloat16 beside those in float32, or gathered of other workers' shards.
        activations: what the forward pass leaves for the backward pass.
        logits: of a chunk of tokens, with the gradients of the head.
        training: the most at one time in a step.
        evaluation: the most while the model is evaluated: whole, before it is sharded and trained,
            or later in a worker's part with copies.
        saving: host memory of every worker's part of a training state, until it is written; on
            GPUs up to twice that, as pinned memory comes in powers of two and is kept.
        loading: host memory of every worker while it reads one, a tensor's part at a time.
    """

    weights: int
    copies: int
    gradients: int
    moments: int
    activations: int | None
    logits: int
    training: int
    evaluation: int
    saving: int
    loading: int

    @property
    def peak(self) -> int:
        """The most that a device has to hold."""
        return max(self.training, self.evaluation)


def is_sharded(settings: TrainingSettings) -> bool:
    """Whether a worker holds a shard of the model."""
    return settings.strategy == "fsdp" and settings.num_workers > 1


def worker_memory(sizes: ModelSizes, settings: TrainingSettings) -> WorkerMemory:
    """What each worker holds while it trains, evaluates, saves and loads."""
    sharded = is_sharded(settings)
    num_shards = settings.num_workers if sharded else 1
    compute = 2 if settings.precision == "bfloat16" else _FLOAT32
    rows = settings.rows_per_forward
    num_passes = settings.global_batch_size // settings.num_workers // rows
    layer = sizes.in_layers // sizes.n_layers
    rest = sizes.num_parameters - sizes.in_layers
    head = sizes.vocab_size * sizes.d_model

    weights = _FLOAT32 * sizes.num_parameters // num_shards
    moments = 2 * weights
    copies, unsharded = sizes.copied_bytes, 0
    if sharded:
        copies = compute * (rest + layer)
        # In full: of the rest until the pass ends, of a layer until it is summed in float32.
        unsharded = compute * rest + (compute + _FLOAT32) * layer
    elif compute < _FLOAT32:
        copies += compute * head

    rows_saved = rows * (sizes.saved_bytes or 0)
    chunk = rows * settings.sequence_length * sizes.vocab_size
    if sizes.has_plain_head:
        chunk = min(LOGITS_AT_ONCE, chunk)
    forward_logits = (compute + 2 * _FLOAT32) * chunk
    head_gradients = compute * head if sharded else 2 * _FLOAT32 * head  # one chunk's, and the sum
    logits = (compute + 3 * _FLOAT32) * chunk + head_gradients
    # Between the passes of a step gradients stay; replicas keep their buckets for good.
    stay = weights if num_passes > 1 or settings.num_workers > 1 else 0
    if settings.activation_checkpointing:
        residual = compute if sharded else _FLOAT32
        inputs = rows * settings.sequence_length * sizes.d_model * residual * sizes.n_layers
        one_layer = rows_saved // sizes.n_layers
        activations = inputs + one_layer
        # Autocast drops its copies when the forward pass ends; a shard gathers again.
        backward = weights + (copies if sharded else 0) + max(one_layer + unsharded, logits)
        at_most = inputs + max(stay + copies + forward_logits, backward)
    else:
        activations = rows_saved
        # Backwards, gradients grow while activations go.
        at_most = copies + max(weights + unsharded, stay + activations + max(unsharded, logits))
    training = weights + moments + at_most
    whole = _FLOAT32 * sizes.num_parameters
    return WorkerMemory(
        weights=weights,
        copies=copies,
        gradients=weights + unsharded,
        moments=moments,
        activations=None if sizes.saved_bytes is None else activations,
        logits=logits,
        training=training,
        evaluation=max(whole, weights + moments + copies),
        saving=3 * whole // settings.num_workers,  # of what all have, each writes a part
        loading=_FLOAT32 * max(head, layer) // num_shards,
    )


def nearest_fit(
    settings: TrainingSettings,
    measure: Callable[[TrainingSettings], ModelSizes],
    memory_bytes: float,
    *,
    may_add_workers: bool = True,
) -> TrainingSettings | None:
    """The settings nearest to a study's that a device holds, with some room; None: there are none.

    Smaller micro-batches come first, then activation checkpointing, then shards, then more workers
    that hold them.
    """
    for candidate in _candidates(settings, may_add_workers=may_add_workers):
        if worker_memory(measure(candidate), candidate).peak <= (1 - _MARGIN) * memory_bytes:
            return candidate
    return None


def _candidates(settings: TrainingSettings, *, may_add_workers: bool) -> Iterator[TrainingSettings]:
    batch, own = settings.global_batch_size, settings.num_workers
    most = min(batch, max(own, _MAX_WORKERS)) if may_add_workers else own
    for num_workers in range(own, most + 1):
        if batch % num_workers:
            continue
        strategies = [settings.strategy] if num_workers == own else ["fsdp"]
        if num_workers > 1 and "fsdp" not in strategies:
            strategies.append("fsdp")
        for strategy in strategies:
            for checkpointing in sorted({settings.activation_checkpointing, True}):
                local = batch // num_workers
                for rows in range(min(settings.rows_per_forward, local), 0, -1):
                    if local % rows == 0:
                        yield settings.model_copy(
                            update={
                                "num_workers": num_workers,
                                "strategy": strategy,
                                "activation_checkpointing": checkpointing,
                                "micro_batch_size": rows,
                            }
                        )
