"""K and P of the untrained starts of a study: what a run measures before its first step, alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ke_ray import storage
from ke_ray.checkpoints.fetch.cache import Store
from ke_ray.data.sources import list_files, split_part
from ke_ray.models.loading import load_model, require_head
from ke_ray.studies.continual import ContinualStudy
from ke_ray.training.inputs import load_questions, read_start
from ke_ray.training.runs import RunSpec, list_runs
from ke_ray.training.snapshot import Snapshot, take_snapshot


def find_sources(study: ContinualStudy) -> dict[str, int]:
    """Source → number of files, of the texts and facts on file systems that the study names.

    Raises:
        DataError: one of them is not there.
    """
    texts = [study.corpus, study.held_out, study.entropy]
    facts = [study.injection.paraphrase, study.injection.once] if study.injection else []
    sources = [*(text.source for text in texts if text), *(path for path in facts if path)]
    return {
        source: len(list_files(split_part(source)[0]))
        for source in dict.fromkeys(sources)
        if not source.startswith("hf:")
    }


def measure_starts(
    study: ContinualStudy, limit: int | None = None
) -> Iterator[tuple[RunSpec, Snapshot]]:
    """Evaluate every start on the probes and the tasks of the study, one after the other.

    The device is a GPU where there is one. Nothing is written but the cache of checkpoints.

    Args:
        limit: use this many items of each task.

    Raises:
        KeRayError: a checkpoint, facts or tasks that cannot be read.
    """
    changes = {"held_out": None, "entropy": None, "resuscitation": None, "seeds": study.seeds[:1]}
    study = study.model_copy(update=changes)
    if limit is not None and study.downstream is not None:
        downstream = study.downstream.model_copy(update={"limit": limit})
        study = study.model_copy(update={"downstream": downstream})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Store(storage.join(study.cache_dir, "checkpoints") if study.cache_dir else None) as store:
        for spec in list_runs(study):
            folder = store.fetch(spec.ref)
            questions = load_questions(study, read_start(study, spec.ref, folder))
            model = load_model(folder, device=device)
            require_head(model, "A continual study")
            yield spec, take_snapshot(model, study, questions)
            del model  # before the next one is loaded
