"""Studies that train in a second or two, on generated biographies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ke_ray.config import validate
from ke_ray.studies.continual import ContinualStudy
from ke_ray.studies.training import PretrainStudy


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, mapping by mapping; None removes a key."""
    result = dict(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def write_study(study: Any, path: Path) -> Path:
    """The study as a file of its own."""
    keys = study.model_dump(mode="json", by_alias=True, exclude_unset=True)
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def tiny_pretrain(output: Path, **changes: Any) -> PretrainStudy:
    """Two layers, d 16, ten steps, checkpoints at 0, 2, 5 and 10."""
    base = {
        "kind": "pretrain",
        "model": {"n_layers": 2, "d_model": 16, "d_mlp": 32, "n_heads": 2, "max_positions": 320},
        "data": {
            "biographies": {
                "num_people": 6,
                "documents_per_person": 12,
                "num_new_people": 4,
                "num_other_people": 8,
                "num_questions": 12,
            },
            "vocab_size": 400,
        },
        "sequence_length": 48,
        "global_batch_size": 8,
        "num_steps": 10,
        "optimizer": {"learning_rate": 0.01},
        "checkpoints": {"steps": [0, 2, 5]},
        "output": str(output),
        "mlflow": {"enabled": False},
    }
    return validate(PretrainStudy, merged(base, changes), "tiny_pretrain")


def tiny_continual(output: Path, series: Path, **changes: Any) -> ContinualStudy:
    """Starts at steps 5 and 10 of :func:`tiny_pretrain`, two injections of four facts."""
    world = series / "world"
    base = {
        "kind": "continual",
        "starts": {"spec": str(series / "checkpoints"), "steps": "5:"},
        "corpus": {
            "name": "others",
            "source": str(world / "other_documents.jsonl.gz"),
            "num_instances": 48,
        },
        "sequence_length": 256,
        "global_batch_size": 8,
        "optimizer": {"learning_rate": 0.005},
        "injection": {
            "paraphrase": str(world / "facts_paraphrase.json"),
            "once": str(world / "facts_once.json"),
            "count": 2,
            "spread": False,
        },
        "probes": {"every": 2},
        "downstream": {
            "tasks": [],
            "own_tasks": {"biographies": str(world / "questions.jsonl")},
            "limit": 6,
        },
        "held_out": {"source": str(world / "documents.jsonl.gz"), "num_instances": 4},
        "entropy": {"source": str(world / "documents.jsonl.gz"), "num_instances": 4},
        "executor": "inline",
        "output": str(output),
        "mlflow": {"enabled": False},
    }
    return validate(ContinualStudy, merged(base, changes), "tiny_continual")
