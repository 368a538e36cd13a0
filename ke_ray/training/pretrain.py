"""Pretraining of a model from scratch, kept as a checkpoint series.

The output folder holds ``checkpoints/step<N>/`` (Hugging Face folders with the tokenizer),
``train.parquet``, ``tokenizer/``, ``data/`` (the packed corpus) and ``manifest.json``; while it
runs also ``state/``, from which a killed run resumes.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer
from torch import nn

from ke_ray import storage
from ke_ray.data.biographies import iter_biographies, make_people, write_biographies
from ke_ray.data.documents import iter_documents
from ke_ray.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from ke_ray.data.training_set import PackedDataset, prepare_training_set
from ke_ray.errors import DataError
from ke_ray.outcomes import PretrainOutcome
from ke_ray.results.manifest import new_manifest, read_manifest, write_manifest
from ke_ray.results.training_folder import write_tables
from ke_ray.storage.ownership import claimed
from ke_ray.studies.identity import check_same_study, identity_fields, identity_keys
from ke_ray.studies.training import PretrainStudy
from ke_ray.tracking.tracker import check_store
from ke_ray.training.checkpoint import TrainingState, remove_states
from ke_ray.training.export import export_model
from ke_ray.training.initial import build_config, build_model
from ke_ray.training.loop import Hooks, Progress, train
from ke_ray.training.parallel import Worker, barrier, lone_worker
from ke_ray.training.tracking import log_progress, tracked_run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainInputs:
    """Tokenizer and training rows of a pretraining run."""

    tokenizer: Tokenizer
    eos_token_id: int
    vocab_size: int
    rows: PackedDataset


def is_finished(study: PretrainStudy) -> bool:
    """Whether the output folder holds this study, and it is finished.

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
    """Make tokenizer and packed corpus, or read them from the output folder.

    Raises:
        DataError: the documents give fewer rows than a step takes, or there is no tokenizer.
    """
    data = study.data
    _remove_other_data(study)
    source = data.source or _biographies(study)
    folder = storage.join(study.output, "tokenizer")
    is_saved = storage.exists(storage.join(folder, "tokenizer.json"))
    if is_saved:
        tokenizer = load_tokenizer(folder)
    elif data.vocab_size is not None:
        tokenizer = train_bpe((text for text, _ in iter_documents(source)), data.vocab_size)
    else:
        tokenizer = load_tokenizer(data.tokenizer or "")
    eos = _eos_token_id(study, tokenizer)
    if not is_saved:
        save_tokenizer(tokenizer, folder, eos_token_id=eos)
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


def _remove_other_data(study: PretrainStudy) -> None:
    """Remove tokenizer and world of an attempt whose ``data`` group was another."""
    note, data = storage.join(study.output, "prepared.json"), study.data.model_dump(mode="json")
    if storage.exists(note) and storage.read_json(note) == data:
        return
    for name in ("tokenizer", "world"):
        folder = storage.join(study.output, name)
        for key, path in (("tokenizer", study.data.tokenizer), ("source", study.data.source)):
            if path and f"{storage.absolute(path)}/".startswith(f"{storage.absolute(folder)}/"):
                raise DataError(
                    f"data.{key} is '{path}', which pretraining with other data keys made in its "
                    "own output folder and would now remove; copy it elsewhere, or give another "
                    "output folder."
                )
        storage.remove(folder)
    storage.write_json(note, data)


def _biographies(study: PretrainStudy) -> str:
    """Write the generated world, unless it is complete; return the path of its documents."""
    world = storage.join(study.output, "world")
    settings = study.data.biographies
    assert settings is not None, "the schema refuses this"
    complete = storage.join(world, "world.json")
    if not storage.exists(complete):  # written last: without it, files may be missing
        files = write_biographies(world, **settings.model_dump(exclude={"num_other_people"}))
        first = settings.num_people + settings.num_new_people
        others = make_people(first + settings.num_other_people, seed=settings.seed)[first:]
        documents = iter_biographies(others, settings.documents_per_person, seed=settings.seed + 1)
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        path = storage.join(world, "other_documents.jsonl.gz")
        storage.write_atomic(path, gzip.compress(text.encode(), 6, mtime=0))
        storage.write_json(complete, {"documents": files.documents, **settings.model_dump()})
    return storage.join(world, "documents.jsonl.gz")


def _cache_dir(output: str) -> str:
    if storage.is_local(output):
        return storage.join(output, "data")
    return str(Path.home() / ".cache" / "ke_ray" / "data")


def _eos_token_id(study: PretrainStudy, tokenizer: Tokenizer) -> int:
    if study.data.eos_token_id is not None:
        return study.data.eos_token_id
    token_id = tokenizer.token_to_id("<|endoftext|>")
    if token_id is None:
        raise DataError(
            f"The tokenizer '{study.data.tokenizer}' has no <|endoftext|>; give data.eos_token_id, "
            "the id to put between documents."
        )
    return int(token_id)


def run_pretrain(
    study: PretrainStudy,
    progress: Callable[[Progress], None] | None = None,
    worker: Worker | None = None,
) -> PretrainOutcome:
    """Pretrain in this process (as one of several workers where ``worker`` says so).

    A finished study is not run again; one that was killed resumes from its last saved state.

    Args:
        worker: None: run alone, on the device that ``use_gpu`` says, and claim the output folder
            (``storage.ownership``). A driver claims it for its workers.

    Raises:
        ResultsError: the output folder is not ke_ray's, holds another study, or another command
            is writing it.
        ConfigError: a GPU is requested and there is none.
        NonFiniteLossError: training broke down; the checkpoints so far are kept.
        StorageError: the MLflow store cannot be used; nothing was trained.
    """
    with claimed(study.output, "pretrain") if worker is None else nullcontext():
        return _run_claimed(study, progress, worker)


def _run_claimed(
    study: PretrainStudy, progress: Callable[[Progress], None] | None, worker: Worker | None
) -> PretrainOutcome:
    started = time.perf_counter()
    finished = is_finished(study)
    if worker is None and not finished:
        worker = lone_worker(study.use_gpu)
        check_store(study.mlflow)  # the driver of workers has checked it for them
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

        def show(update: Progress) -> None:
            log(update)
            if progress is not None:
                progress(update)

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
    return replace(outcome, num_done=1, num_skipped=0)


def _run_name(study: PretrainStudy) -> str:
    return study.name or study.output.rstrip("/").rsplit("/", 1)[-1]


def _finished_outcome(study: PretrainStudy) -> PretrainOutcome:
    manifest = read_manifest(study.output, "pretrain")
    return PretrainOutcome(
        study.output,
        num_skipped=1,
        checkpoint_steps=tuple(manifest["checkpoint_steps"]),
        num_tokens=manifest["num_tokens"],
        first_loss=manifest["first_loss"],
        final_loss=manifest["final_loss"],
        duration_s=manifest["duration_s"],
    )
