"""A resuscitated copy of a checkpoint, with a record of where its multipliers came from.

    scan's C̄ (of these very weights) → u (Algorithm 1 or a control) → K'_i = u_i K_i → new folder

``resuscitation.json`` in the folder holds ratio, factor, control, the source of the coefficients,
both weights hashes and whether the coefficients were those of other weights. Needs no Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ke_ray import storage
from ke_ray.errors import CheckpointSpecError, ConfigError, StorageError, UserError, nearest
from ke_ray.results.manifest import command_line, now, versions
from ke_ray.secrets import redact
from ke_ray.storage.ownership import lock_beside
from ke_ray.storage.sole_writer import sole_writer

if TYPE_CHECKING:
    import torch

    from ke_ray.checkpoints.reference import CheckpointRef

PROVENANCE = "resuscitation.json"
_CONTROLS = ("random", "matched_norm", "attention_temperature")


@dataclass(frozen=True)
class Measurement:
    """A corpus on which knowledge entropy is measured before and after."""

    source: str
    num_instances: int
    sequence_length: int | None = None
    tokenizer: str | None = None
    eos_token_id: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Resuscitated:
    """What was written, and what is known of it.

    Attributes:
        selected_rows: rows of the up projection at or below the quantile, a layer each.
        dead_rows: of those, rows whose coefficient is zero; their multiplier is 1.
        entropy_nats: H of the given C̄, by layer; empty for the attention control.
        predicted_entropy_nats: H of u · C̄, layer inputs held fixed, by layer.
        measured_before_nats, measured_after_nats: totals on the corpus that was asked for.
    """

    output: str
    checkpoint: str
    ratio: float | None
    factor: float
    control: str | None
    seed: int
    layout: str
    coefficients: str | None
    coefficients_verified: bool | None
    weights_sha256_before: str
    weights_sha256_after: str
    selected_rows: list[int] = field(default_factory=list)
    dead_rows: list[int] = field(default_factory=list)
    entropy_nats: list[float] = field(default_factory=list)
    predicted_entropy_nats: list[float] = field(default_factory=list)
    measured_on: str | None = None
    measured_before_nats: float | None = None
    measured_after_nats: float | None = None


def check_request(
    *,
    ratio: float | None,
    factor: float,
    control: str | None,
    coefficients: str | None,
    output: str,
) -> None:
    """What can be wrong with a request before anything is read.

    Raises:
        UserError: ratio, factor or control out of range, or coefficients missing.
        StorageError: the output folder holds something.
    """
    from ke_ray.core.resuscitation import check_parameters

    if control is not None and control not in _CONTROLS:
        raise ConfigError(
            f"unknown control {control!r}.{nearest(control, _CONTROLS)} "
            f"Known: {', '.join(_CONTROLS)} (or none)"
        )
    if control == "attention_temperature":
        check_parameters(1.0 if ratio is None else ratio, factor)
    else:
        if ratio is None:
            raise ConfigError("--ratio must be given: the share of memories to raise, in (0, 1].")
        check_parameters(ratio, factor, control)
        if coefficients is None:
            raise ConfigError(
                "--coefficients must be given: the folder of a scan of this checkpoint, or the "
                "authors' mlp_average_coefficients.pt. 'ke-ray scan CHECKPOINT --data DATA "
                "--output SCAN' makes one."
            )
    _check_free(output)


def _check_free(output: str) -> None:
    is_file = storage.is_local(output) and storage.local_path(output).is_file()
    if storage.list_dir(output) or is_file:
        raise StorageError(f"'{output}' exists already; choose another folder for the checkpoint.")


def one_checkpoint(spec: str, revisions: str | None = None) -> CheckpointRef:
    """The one checkpoint that a SPEC names.

    Raises:
        CheckpointSpecError: none, or several.
    """
    from ke_ray.checkpoints.find.catalog import list_checkpoints

    refs = list_checkpoints(spec, revisions=revisions)
    if len(refs) != 1:
        shown = ", ".join(ref.name for ref in refs[:5]) + (", …" if len(refs) > 5 else "")
        raise CheckpointSpecError(
            f"'{spec}' names {len(refs)} checkpoints ({shown}); one is resuscitated at a time. "
            "Give its own folder, or choose with --revisions."
        )
    return refs[0]


def write_resuscitated(
    ref: CheckpointRef,
    output: str,
    *,
    ratio: float | None,
    factor: float,
    control: str | None = None,
    seed: int = 0,
    coefficients: str | None = None,
    allow_mismatch: bool = False,
    layout: Literal["hf", "native"] = "hf",
    measure: Measurement | None = None,
    cache_dir: str | None = None,
) -> Resuscitated:
    """Write a modified copy of a checkpoint (float32) with its record.

    Args:
        ref: the checkpoint, anywhere.
        output: a folder that does not exist or is empty; it appears whole or not at all.
        ratio: p in (0, 1]; not used by the attention control.
        factor: q above 0; the temperature τ for the attention control.
        control: None (Algorithm 1), ``random``, ``matched_norm`` or ``attention_temperature``.
        coefficients: scan folder or the authors' ``.pt``; not used by the attention control.
        allow_mismatch: take coefficients of other weights; the record says so.
        layout: ``hf`` or OLMo's ``native``.
        measure: also measure the knowledge entropy, before and after.

    Raises:
        UserError: bad input, see :func:`check_request`, or another command writes this folder;
            nothing was written.
        ResultsError: no coefficients of these weights.
        UnsupportedArchitectureError: no such architecture, or it has no native layout.
        CheckpointError: the checkpoint cannot be fetched or loaded.
    """
    check_request(
        ratio=ratio, factor=factor, control=control, coefficients=coefficients, output=output
    )
    from ke_ray.checkpoints.fetch.cache import Store
    from ke_ray.checkpoints.formats.fingerprint import weights_sha256
    from ke_ray.checkpoints.formats.olmo_config import NativeConfig
    from ke_ray.models.loading import load_config, load_model
    from ke_ray.resuscitation.apply import apply_attention_temperature, resuscitate

    values: dict[str, Any] = {
        "output": output,
        "checkpoint": redact(ref.label),
        "ratio": None if control == "attention_temperature" else ratio,
        "factor": factor,
        "control": control,
        "seed": seed,
        "layout": layout,
        "coefficients": None,
        "coefficients_verified": None,
    }
    with sole_writer(lock_beside(output), output), Store(cache_dir) as store:
        _check_free(output)  # somebody may have filled it until the lock was ours
        folder = store.fetch(ref)
        if layout == "native":
            NativeConfig.from_transformers(load_config(folder))  # refuses what it cannot hold
        before = weights_sha256(folder)
        mean = None
        if control != "attention_temperature":
            assert coefficients is not None
            mean = _coefficients(coefficients, before, ref.name, allow_mismatch, values)
        corpus = _corpus(measure, folder)
        model = load_model(folder)
        values |= {"weights_sha256_before": before}
        values |= _measured("measured_before_nats", model, corpus, measure)
        if mean is None:
            apply_attention_temperature(model, factor)
        else:
            assert ratio is not None
            rows = resuscitate(model, mean, ratio=ratio, factor=factor, control=control, seed=seed)
            values |= _expected(mean, rows, ratio)
        values |= _measured("measured_after_nats", model, corpus, measure)
        return _save(model, folder, output, layout, values)


def _coefficients(
    source: str, sha256: str, name: str, allow_mismatch: bool, values: dict[str, Any]
) -> torch.Tensor:
    import torch

    from ke_ray.resuscitation.coefficients import find_coefficients

    found = find_coefficients(
        source, weights_sha256=sha256, checkpoint=name, allow_mismatch=allow_mismatch
    )
    values |= {
        "coefficients": redact(found.source),
        "coefficients_verified": found.verified,
    }
    return torch.from_numpy(found.values)


def _expected(mean: torch.Tensor, rows: torch.Tensor, ratio: float) -> dict[str, Any]:
    from ke_ray.core.entropy import entropy_nats
    from ke_ray.core.resuscitation import dead_rows, predicted_entropy_nats, select_rows

    return {
        "selected_rows": select_rows(mean, ratio).sum(dim=-1).tolist(),
        "dead_rows": dead_rows(mean).sum(dim=-1).tolist(),
        "entropy_nats": entropy_nats(mean.double()).tolist(),
        "predicted_entropy_nats": predicted_entropy_nats(mean, rows.cpu()).tolist(),
    }


def _corpus(measure: Measurement | None, folder: str) -> Any:
    if measure is None:
        return None
    from ke_ray.checkpoints.reference import find_tokenizer
    from ke_ray.data.corpus import build_corpus, parse_data_option
    from ke_ray.data.tokenizer import load_tokenizer
    from ke_ray.models.loading import load_config

    config = load_config(folder)
    eos = measure.eos_token_id if measure.eos_token_id is not None else config.eos_token_id
    positions = getattr(config, "max_position_embeddings", None)
    length = measure.sequence_length or min(positions or 1024, 1024)
    if positions is not None and length > positions:
        raise UserError(
            f"--sequence-length {length} exceeds the model's {positions} positions; ask for less."
        )
    place = measure.tokenizer or find_tokenizer(folder)
    name, source = parse_data_option(measure.source)
    return build_corpus(
        name,
        source,
        num_instances=measure.num_instances,
        sequence_length=length,
        tokenizer=None if place is None else load_tokenizer(str(place)),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        vocab_size=config.vocab_size,
        sampling="spread",
    )


def _measured(key: str, model: Any, corpus: Any, measure: Measurement | None) -> dict[str, Any]:
    if corpus is None or measure is None:
        return {}
    from ke_ray.core.measures import evaluate
    from ke_ray.models.scoring import score_instances

    sums = score_instances(
        model,
        corpus.input_ids,
        corpus.lengths,
        measures=("knowledge_entropy",),
        num_instances=corpus.num_instances,
        group_sizes=corpus.group_sizes,
        batch_size=measure.batch_size,
    )
    row = evaluate(sums, ["knowledge_entropy"]).row("knowledge_entropy")
    return {key: row.value, "measured_on": redact(corpus.source)}


def _other_weights(result: Resuscitated) -> bool | None:
    """None where that cannot be known: the authors' file has no hash."""
    if result.coefficients is None or "#" not in result.coefficients:
        return None
    return not result.coefficients_verified


def _save(
    model: Any,
    source: str,
    output: str,
    layout: Literal["hf", "native"],
    values: dict[str, Any],
) -> Resuscitated:
    from ke_ray.checkpoints.formats.fingerprint import tensors_sha256
    from ke_ray.checkpoints.reference import find_tokenizer
    from ke_ray.models.saving import save_model

    found = find_tokenizer(source)
    tokenizer = None
    if found is not None:
        tokenizer = source if found.parent == storage.local_path(source) else str(found)
    result = Resuscitated(**values, weights_sha256_after=tensors_sha256(model.state_dict()))
    record = {
        "kind": "resuscitated checkpoint",
        "created_at": now(),
        "command": command_line(),
        "versions": versions(),
        **{key: value for key, value in asdict(result).items() if key != "output"},
        "coefficients_of_other_weights": _other_weights(result),
    }
    # The record belongs to the checkpoint: both appear at once.
    extra = {PROVENANCE: storage.json_text(record)}
    save_model(model, output, layout=layout, tokenizer=tokenizer, extra=extra)
    return result
