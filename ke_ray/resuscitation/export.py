"""A resuscitated copy of a checkpoint, with a record of where its multipliers came from.

    scan's C̄ (of these very weights) → u (Algorithm 1 or a control) → K'_i = u_i K_i → new folder

``resuscitation.json`` in the folder holds ratio, factor, control, the source of the coefficients,
both weights hashes and whether the coefficients were those of other weights. Needs no Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ke_ray import storage
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.formats.fingerprint import tensors_sha256, weights_sha256
from ke_ray.checkpoints.formats.olmo_config import NativeConfig
from ke_ray.checkpoints.reference import CheckpointRef, find_tokenizer
from ke_ray.core.measures import evaluate
from ke_ray.core.resuscitation import check_parameters
from ke_ray.data.corpus import Corpus, build_corpus
from ke_ray.data.tokenizer import load_tokenizer
from ke_ray.errors import CheckpointSpecError, ConfigError, StorageError, UserError, nearest
from ke_ray.models.loading import load_config, load_model
from ke_ray.models.saving import save_model
from ke_ray.models.scoring import score_instances
from ke_ray.results.manifest import command_line, now, versions
from ke_ray.resuscitation.apply import ResuscitationRecord, resuscitate
from ke_ray.resuscitation.coefficients import coefficients_of
from ke_ray.resuscitation.prediction import RECORD_NAME
from ke_ray.secrets import redact
from ke_ray.storage.ownership import lock_beside
from ke_ray.storage.sole_writer import sole_writer
from ke_ray.studies.parts import CONTROLS, EvaluationText, Resuscitation

WeightsLayout = Literal["hf", "native"]


@dataclass(frozen=True, kw_only=True)
class ResuscitatedCheckpoint(ResuscitationRecord):
    """A checkpoint that was written, and how it was made.

    Attributes:
        measured_on: source of the text on which knowledge entropy was measured; None: not measured.
        measured_before_nats, measured_after_nats: knowledge entropy, the sum over layers.
    """

    output: str
    checkpoint: str
    ratio: float | None
    factor: float
    control: str | None
    seed: int
    layout: WeightsLayout
    weights_sha256_before: str
    weights_sha256_after: str
    measured_on: str | None = None
    measured_before_nats: float | None = None
    measured_after_nats: float | None = None


def check_request(
    output: str,
    *,
    ratio: float | None,
    factor: float,
    control: str | None,
    seed: int,
    coefficients: str | None,
    allow_mismatch: bool,
) -> Resuscitation:
    """Check a request before anything is read.

    Raises:
        UserError: ratio, factor or control out of range, or coefficients missing.
        StorageError: the output folder is not empty.
    """
    if control is not None and control not in CONTROLS:
        raise ConfigError(
            f"unknown control {control!r}.{nearest(control, CONTROLS)} "
            f"Controls: {', '.join(CONTROLS)} (or none)"
        )
    if control == "attention_temperature":
        ratio = 1.0 if ratio is None else ratio
        check_parameters(ratio, factor)
    elif ratio is None:
        raise ConfigError("--ratio must be given: the share of memories to raise, in (0, 1].")
    else:
        check_parameters(ratio, factor, control)
        if coefficients is None:
            raise ConfigError(
                "--coefficients must be given: the folder of a scan of this checkpoint, or the "
                "authors' mlp_average_coefficients.pt. 'ke-ray scan CHECKPOINT --data DATA "
                "--output SCAN' makes one."
            )
    _check_free(output)
    return Resuscitation(
        ratio=ratio,
        factor=factor,
        control=control,
        seed=seed,
        coefficients=coefficients,
        allow_mismatch=allow_mismatch,
    )


def _check_free(output: str) -> None:
    is_file = storage.is_local(output) and storage.local_path(output).is_file()
    if storage.list_dir(output) or is_file:
        raise StorageError(f"'{output}' exists already; choose another folder for the checkpoint.")


def single_checkpoint(spec: str, revisions: str | None = None) -> CheckpointRef:
    """The one checkpoint that a SPEC names.

    Raises:
        CheckpointSpecError: none, or several.
    """
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
    settings: Resuscitation,
    *,
    layout: WeightsLayout = "hf",
    measure: EvaluationText | None = None,
    tokenizer: str | None = None,
    cache_dir: str | None = None,
) -> ResuscitatedCheckpoint:
    """Write a modified copy of a checkpoint (float32) with its record.

    Args:
        ref: the checkpoint, local or remote.
        output: a folder that does not exist or is empty; it appears whole or not at all.
        settings: from :func:`check_request`.
        layout: ``hf`` or OLMo's ``native``.
        measure: text on which to measure knowledge entropy before and after; None: do not.
        tokenizer: for documents in ``measure``; None: the checkpoint's.

    Raises:
        UserError: the text does not fit the model, or another command writes this folder; nothing
            was written.
        ResultsError: no coefficients of these weights.
        UnsupportedArchitectureError: no such architecture, or it has no native layout.
        CheckpointError: the checkpoint cannot be fetched or loaded.
    """
    with sole_writer(lock_beside(output), output), Store(cache_dir) as store:
        _check_free(output)  # another command may have filled it until the lock was ours
        folder = store.fetch(ref)
        if layout == "native":
            NativeConfig.from_transformers(load_config(folder))  # refuses what it cannot hold
        sha256 = weights_sha256(folder)
        coefficients = coefficients_of(settings, lambda: sha256, ref.name)
        corpus = None if measure is None else _corpus(measure, tokenizer, folder)
        model = load_model(folder)
        measured: dict[str, Any] = {}
        if measure is not None and corpus is not None:
            measured["measured_on"] = redact(corpus.source)
            measured["measured_before_nats"] = _entropy_nats(model, corpus, measure)
        record = resuscitate(model, settings, coefficients)
        if measure is not None and corpus is not None:
            measured["measured_after_nats"] = _entropy_nats(model, corpus, measure)
        result = ResuscitatedCheckpoint(
            **asdict(record),
            output=output,
            checkpoint=redact(ref.label),
            ratio=None if settings.control == "attention_temperature" else settings.ratio,
            factor=settings.factor,
            control=settings.control,
            seed=settings.seed,
            layout=layout,
            weights_sha256_before=sha256,
            weights_sha256_after=tensors_sha256(model.state_dict()),
            **measured,
        )
        _save(model, folder, result)
        return result


def _corpus(text: EvaluationText, tokenizer: str | None, folder: str) -> Corpus:
    config = load_config(folder)
    eos = config.eos_token_id
    positions = getattr(config, "max_position_embeddings", None)
    length = text.sequence_length or min(positions or 1024, 1024)
    if positions is not None and length > positions:
        raise UserError(
            f"--sequence-length {length} exceeds the model's {positions} positions; ask for less."
        )
    path = tokenizer or find_tokenizer(folder)
    return build_corpus(
        text.name,
        text.source,
        num_instances=text.num_instances,
        sequence_length=length,
        tokenizer=None if path is None else load_tokenizer(str(path)),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        vocab_size=config.vocab_size,
        sampling=text.sampling,
    )


def _entropy_nats(model: Any, corpus: Corpus, text: EvaluationText) -> float:
    sums = score_instances(
        model,
        corpus.input_ids,
        corpus.lengths,
        measures=("knowledge_entropy",),
        num_instances=corpus.num_instances,
        group_sizes=corpus.group_sizes,
        batch_size=text.batch_size,
    )
    return evaluate(sums, ["knowledge_entropy"]).row("knowledge_entropy").value


def _other_weights(result: ResuscitatedCheckpoint) -> bool | None:
    """None where that cannot be known: the authors' file has no hash."""
    if result.coefficients is None or "#" not in result.coefficients:
        return None
    return not result.coefficients_verified


def _save(model: Any, source: str, result: ResuscitatedCheckpoint) -> None:
    tokenizer = find_tokenizer(source)
    if tokenizer is not None and tokenizer.parent == storage.local_path(source):
        tokenizer = tokenizer.parent  # with the files beside it
    record = {
        "kind": "resuscitated checkpoint",
        "created_at": now(),
        "command": command_line(),
        "versions": versions(),
        **{key: value for key, value in asdict(result).items() if key != "output"},
        "coefficients_of_other_weights": _other_weights(result),
    }
    save_model(
        model,
        result.output,
        layout=result.layout,
        tokenizer=None if tokenizer is None else str(tokenizer),
        # The record belongs to the checkpoint: both appear at once.
        extra={RECORD_NAME: storage.json_text(record)},
    )
