"""``ke-ray pretrain``: a model from scratch, kept as a checkpoint series.

The output folder holds ``checkpoints/step<N>/`` (Hugging Face folders with the tokenizer),
``train.parquet``, ``tokenizer/``, ``data/`` (the packed corpus) and ``manifest.json``; while it
runs also ``state/``, from which a killed run goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ke_ray import storage
from ke_ray.errors import DataError
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.results.training_folder import write_tables
from ke_ray.storage.ownership import claimed
from ke_ray.studies.identity import check_same_study, identity_fields, identity_keys
from ke_ray.studies.training import PretrainStudy
from ke_ray.tracking.tracker import check_store
from ke_ray.training.checkpoint import TrainingState, remove_states
from ke_ray.training.export import export_model
from ke_ray.training.loop import Hooks, Progress, train
from ke_ray.training.parallel import Worker, barrier
from ke_ray.training.tracking import log_progress, tracked_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from ke_ray.data.training_set import PackedDataset

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainOutcome:
    """What a finished pretraining left."""

    output: str
    checkpoint_steps: tuple[int, ...]
    skipped: bool
    num_steps: int
    num_tokens: int
    first_loss: float
    final_loss: float
    duration_s: float


@dataclass(frozen=True)
class PretrainInputs:
    """What a pretraining reads."""

    tokenizer: Tokenizer
    eos_token_id: int
    vocab_size: int
    rows: PackedDataset


def is_finished(study: PretrainStudy) -> bool:
    """Whether the output folder holds this very study, finished.

    Raises:
        ResultsError: it holds another study, or results of another kind.
    """
    path = storage.join(study.output, "manifest.json")
    if not storage.exists(path):
        return False
    manifest = read_manifest(study.output, "pretrain")
    check_same_study(study.output, manifest, identity_keys(study))
    return manifest.get("status") == "finished"


def prepare_data(study: PretrainStudy) -> PretrainInputs:
    """Tokenizer and packed corpus, made once and found again in the output folder.

    Raises:
        DataError: the documents give fewer rows than a step takes, or no tokenizer is there.
    """
    from ke_ray.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
    from ke_ray.data.training_set import prepare_training_set

    data = study.data
    _forget_other_data(study)
    source = data.source or _biographies(study)
    place = storage.join(study.output, "tokenizer")
    if storage.exists(storage.join(place, "tokenizer.json")):
        tokenizer = load_tokenizer(place)
        eos = _eos_token_id(study, tokenizer)
    elif data.vocab_size is not None:
        from ke_ray.data.documents import iter_documents

        tokenizer = train_bpe((text for text, _ in iter_documents(source)), data.vocab_size)
        eos = _eos_token_id(study, tokenizer)
        save_tokenizer(tokenizer, place, eos_token_id=eos)
    else:
        tokenizer = load_tokenizer(data.tokenizer or "")
        eos = _eos_token_id(study, tokenizer)
        save_tokenizer(tokenizer, place, eos_token_id=eos)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    vocab_size = -(-(largest + 1) // 64) * 64  # a multiple of 64, as OLMo's embedding_size
    rows = prepare_training_set(
        source,
        _cache_dir(study.output),
        sequence_length=study.sequence_length,
        tokenizer=tokenizer,
        eos_token_id=eos,
        vocab_size=vocab_size,
        num_instances=data.num_instances,
        seed=study.seed,
    )
    rows.steps_per_epoch(study.global_batch_size)  # refuses a corpus below one batch
    return PretrainInputs(tokenizer, eos, vocab_size, rows)


def _forget_other_data(study: PretrainStudy) -> None:
    """Removes tokenizer and world that an attempt with other data keys left."""
    note, keys = storage.join(study.output, "prepared.json"), study.data.model_dump(mode="json")
    if storage.exists(note) and storage.read_json(note) == keys:
        return
    for name in ("tokenizer", "world"):
        place = storage.join(study.output, name)
        for key, read in (("tokenizer", study.data.tokenizer), ("source", study.data.source)):
            if read and f"{storage.absolute(read)}/".startswith(f"{storage.absolute(place)}/"):
                raise DataError(
                    f"data.{key} is '{read}', which pretraining with other data keys made in its "
                    f"own output folder and would now remove; copy it elsewhere, or give another "
                    "output folder."
                )
        storage.remove(place)
    storage.write_json(note, keys)


def _biographies(study: PretrainStudy) -> str:
    """Writes the generated world where it is not there yet; its documents."""
    import gzip

    from ke_ray.data.biographies import iter_biographies, make_people, write_biographies

    world = storage.join(study.output, "world")
    keys = study.data.biographies
    if keys is None:
        raise DataError("This study has neither data.source nor data.biographies.")
    done = storage.join(world, "world.json")
    if not storage.exists(done):  # written last: without it the files may be half there
        files = write_biographies(world, **keys.model_dump(exclude={"num_other_people"}))
        first = keys.num_people + keys.num_new_people
        others = make_people(first + keys.num_other_people, seed=keys.seed)[first:]
        documents = iter_biographies(others, keys.documents_per_person, seed=keys.seed + 1)
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        place = storage.join(world, "other_documents.jsonl.gz")
        storage.write_atomic(place, gzip.compress(text.encode(), 6, mtime=0))
        storage.write_json(done, {"documents": files.documents, **keys.model_dump()})
    return storage.join(world, "documents.jsonl.gz")


def _cache_dir(output: str) -> str:
    if storage.is_local(output):
        return storage.join(output, "data")
    from pathlib import Path

    return str(Path.home() / ".cache" / "ke_ray" / "data")


def _eos_token_id(study: PretrainStudy, tokenizer: Tokenizer) -> int:
    if study.data.eos_token_id is not None:
        return study.data.eos_token_id
    found = tokenizer.token_to_id("<|endoftext|>")
    if found is None:
        raise DataError(
            f"The tokenizer '{study.data.tokenizer}' has no <|endoftext|>; give data.eos_token_id, "
            "the id to put between documents."
        )
    return int(found)


def run_pretrain(
    study: PretrainStudy,
    progress: Callable[[Progress], None] | None = None,
    worker: Worker | None = None,
) -> PretrainOutcome:
    """Pretrain in this process (as one of several workers where ``worker`` says so).

    A finished study is not run again; one that was killed goes on from its last saved state.

    Args:
        worker: None claims the output folder (``storage.ownership``); whoever starts workers has
            claimed it for them.

    Raises:
        ResultsError: the output folder is somebody else's, holds another study, or another
            command is writing it.
        NonFiniteLossError: training broke down; the checkpoints so far are kept.
        StorageError: the MLflow store cannot be used; nothing was trained.
    """
    with claimed(study.output, "pretrain") if worker is None else nullcontext():
        return _run_claimed(study, progress, worker or Worker())


def _run_claimed(
    study: PretrainStudy, progress: Callable[[Progress], None] | None, worker: Worker
) -> PretrainOutcome:
    from ke_ray.training.initial import build_config, build_model

    started = time.perf_counter()
    finished = is_finished(study)
    if worker is None and not finished:
        check_store(study.mlflow)  # workers on Ray are past this: their driver has looked
    worker = worker or Worker()
    barrier(worker)
    if finished:
        return _finished_outcome(study)
    if worker.is_main:
        storage.check_writable(study.output)
        prepare_data(study)
    barrier(worker)
    data = prepare_data(study)
    config = build_config(
        study.model,
        vocab_size=data.vocab_size,
        sequence_length=study.sequence_length,
        eos_token_id=data.eos_token_id,
    )
    fields = identity_fields(identity_keys(study))
    identity = fields["identity"]
    manifest = new_manifest("pretrain", study.model_dump(mode="json"))
    manifest |= {**fields, "data_sha256": data.rows.sha256}
    if worker.is_main:
        write_manifest(study.output, manifest)
    model = build_model(config, study.seed).to(worker.device)
    states = storage.join(study.output, "state")
    tokenizer_folder = storage.join(study.output, "tokenizer")

    def keep(step: int, bare: nn.Module, _state: TrainingState) -> None:
        uri = storage.join(study.output, "checkpoints", f"step{step}")
        export_model(bare, uri, worker, tokenizer_folder)

    with tracked_run(
        study.mlflow,
        worker,
        name=_run_name(study),
        key=f"pretrain {storage.absolute(study.output)}",
        kind="pretrain",
        params=study.model_dump(mode="json", exclude={"mlflow"}),
        tags={"data_sha256": data.rows.sha256, "identity": identity},
    ) as run:
        run.log_dataset("pretraining", data.rows.sha256, data.rows.source, "training")
        log = log_progress(run, study.num_steps)

        def show(shown: Progress) -> None:
            log(shown)
            if progress is not None:
                progress(shown)

        state = train(
            model,
            data.rows,
            study,
            num_steps=study.num_steps,
            worker=worker,
            hooks=Hooks(
                after_step=keep,
                at_steps=frozenset(study.checkpoint_steps),
                on_progress=show,
            ),
            state_uri=states,
            identity=identity,
        )
    if worker.is_main:
        write_tables(study.output, {"train": state.records["train"]}, _run_name(study))
        losses = [row["loss"] for row in state.records["train"]]
        manifest |= {
            "status": "finished",
            "num_parameters": model.num_parameters(),
            "num_tokens": state.num_tokens,
            "first_loss": losses[0],
            "final_loss": losses[-1],
            "duration_s": state.elapsed_s,
            "checkpoint_steps": list(study.checkpoint_steps),
        }
        write_manifest(study.output, manifest)
        if not study.keep_state:
            remove_states(states)
    barrier(worker)
    outcome = _finished_outcome(study)
    _log.info("pretrained in %.1f s", time.perf_counter() - started)
    return PretrainOutcome(**{**outcome.__dict__, "skipped": False})


def _run_name(study: PretrainStudy) -> str:
    return study.name or study.output.rstrip("/").rsplit("/", 1)[-1]


def _finished_outcome(study: PretrainStudy) -> PretrainOutcome:
    manifest = read_manifest(study.output, "pretrain")
    return PretrainOutcome(
        output=study.output,
        checkpoint_steps=tuple(manifest["checkpoint_steps"]),
        skipped=True,
        num_steps=study.num_steps,
        num_tokens=manifest["num_tokens"],
        first_loss=manifest["first_loss"],
        final_loss=manifest["final_loss"],
        duration_s=manifest["duration_s"],
    )
