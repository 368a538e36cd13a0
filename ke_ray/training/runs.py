"""Runs of a continual-learning study: their list, names, identities and rows.

A run keeps everything in ``<output>/runs/<run>/``; ``run.json`` there holds its identity and its
row of ``runs.parquet``, and is written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ke_ray import storage
from ke_ray.checkpoints.find.catalog import list_checkpoints
from ke_ray.checkpoints.reference import CheckpointRef, position
from ke_ray.core.position import stage_key
from ke_ray.errors import CheckpointSpecError
from ke_ray.secrets import redact
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.identity import identity, identity_keys


@dataclass(frozen=True)
class RunSpec:
    """One run of a study: a starting checkpoint and a seed."""

    name: str
    ref: CheckpointRef
    seed: int


def list_runs(study: ContinualStudy) -> list[RunSpec]:
    """The runs of a study: starting checkpoints in training order, each with all seeds.

    Raises:
        CheckpointSpecError: the selection names nothing.
    """
    starts = study.starts
    refs = list_checkpoints(starts.spec, **starts.options())
    if starts.nearest:
        numbered = [ref for ref in refs if ref.step is not None]
        if not numbered:
            raise CheckpointSpecError(
                f"starts.nearest is given, but no checkpoint of '{starts.spec}' has a step in its "
                "name; leave it out."
            )
        # Steps of a later stage may start again; its checkpoints are chosen by `revisions`.
        first = min(stage_key(ref.stage, ref.stage_label) for ref in numbered)
        numbered = [r for r in numbered if stage_key(r.stage, r.stage_label) == first]
        nearest = {
            min(numbered, key=lambda r: abs((r.step or 0) - step)) for step in starts.nearest
        }
        refs = [ref for ref in refs if ref in nearest]
    if starts.spread is not None and starts.spread < len(refs):
        last, gaps = len(refs) - 1, max(1, starts.spread - 1)
        refs = [refs[last - round(i * last / gaps)] for i in range(starts.spread)][::-1]
    return [
        RunSpec(storage.slug(f"{ref.name}-seed{seed}"), ref, seed)
        for ref in refs
        for seed in study.seeds
    ]


def study_keys(study: ContinualStudy) -> dict[str, Any]:
    """The keys that change a run's result; starts and seeds only select the runs."""
    return identity_keys(study, without=("starts", "seeds"))


def run_identity(study: ContinualStudy, spec: RunSpec) -> str:
    """Hex sha256 of the study's keys, the starting weights and the seed."""
    weights = spec.ref.weights_fingerprint or spec.ref.commit or spec.ref.label
    return identity([study_keys(study), weights, spec.seed])


def part_folder(study: ContinualStudy, spec: RunSpec) -> str:
    """The folder of one run."""
    return storage.join(study.output, "runs", spec.name)


def run_key(study: ContinualStudy, spec: RunSpec, parent_id: str | None = None) -> str:
    """The key by which a run's MLflow run is looked up.

    Args:
        parent_id: id of the sweep's MLflow run. Without one, the output folder distinguishes runs
            of the same name; its path is absolute because two working folders may log into one
            store.
    """
    return f"continual {parent_id or storage.absolute(study.output)} {spec.name}"


def read_row(study: ContinualStudy, spec: RunSpec) -> dict[str, Any] | None:
    """The run's row of ``runs.parquet``; None where it is not finished, or of another identity."""
    path = storage.join(part_folder(study, spec), "run.json")
    if not storage.exists(path):
        return None
    finished = storage.read_json(path)
    return finished["row"] if finished.get("identity") == run_identity(study, spec) else None


def base_row(study: ContinualStudy, spec: RunSpec) -> dict[str, Any]:
    """The columns of a row that identify the run."""
    resuscitation = study.resuscitation
    return {
        "run": spec.name,
        "checkpoint": spec.ref.name,
        **position(spec.ref),
        "pretraining_seed": spec.ref.seed,
        "seed": spec.seed,  # of the run, not of its start
        "corpus": study.corpus.name,
        "resuscitation_ratio": resuscitation.ratio if resuscitation else None,
        "amplifying_factor": resuscitation.factor if resuscitation else None,
        "control": resuscitation.control if resuscitation else None,
    }


def write_failed(
    study: ContinualStudy, spec: RunSpec, error: str, *, fit: str | None = None
) -> None:
    """Write a failed run's row; the next command (another ``fit``) tries the run again."""
    row = {**base_row(study, spec), "status": "failed", "error": redact(error), "fit": fit}
    write_row(study, spec, row)


def write_row(study: ContinualStudy, spec: RunSpec, row: dict[str, Any]) -> None:
    """Write a run's row, which makes it finished; call it after all else is written."""
    values = {"identity": run_identity(study, spec), "row": row}
    storage.write_json(storage.join(part_folder(study, spec), "run.json"), values)
