"""What lies on the laboratory's store, and a tiny study of it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from lab_cluster import BUCKET
from tiny_studies import tiny_continual

STORE = f"s3://{BUCKET}"


def make_data(pretrained: Path, folder: Path) -> None:
    """A tiny series, and documents and facts by the names that the shipped jobs know."""
    world = pretrained / "world"
    shutil.copytree(pretrained / "checkpoints", folder / "series" / "checkpoints")
    for name in ("pubmed", "dolma", "fictional_knowledge"):
        (folder / "data" / name).mkdir(parents=True)
    with (
        gzip.open(world / "other_documents.jsonl.gz", "rt") as documents,
        (folder / "data" / "pubmed" / "a.jsonl").open("w") as articles,
    ):
        for line in documents:
            articles.write(json.dumps({"contents": json.loads(line)["text"]}) + "\n")
    for source, target in (
        ("documents.jsonl.gz", "dolma/a.json.gz"),
        ("facts_paraphrase.json", "fictional_knowledge/paraphrase70.json"),
        ("facts_once.json", "fictional_knowledge/once60.json"),
        ("questions.jsonl", "questions.jsonl"),
    ):
        shutil.copy(world / source, folder / "data" / target)
    ids = np.random.default_rng(0).integers(2, 300, (40, 24), np.uint16)
    np.save(folder / "ids.npy", ids)


def continual_keys(place: str, output: str, **changes: Any) -> dict[str, Any]:
    """A tiny study whose checkpoints, documents and facts lie at ``place``."""
    facts = f"{place}/data/fictional_knowledge"
    study = tiny_continual(
        Path("output"),
        Path("place"),
        starts={"spec": f"{place}/series/checkpoints", "steps": "10:10"},
        corpus={"source": f"{place}/data/pubmed/*.jsonl#contents"},
        held_out={"source": f"{place}/data/dolma/*.json.gz"},
        entropy={"source": f"{place}/data/dolma/*.json.gz"},
        injection={"paraphrase": f"{facts}/paraphrase70.json", "once": f"{facts}/once60.json"},
        downstream={"own_tasks": {"biographies": f"{place}/data/questions.jsonl"}},
        keep_final=False,
        **changes,
    )
    keys = study.model_dump(mode="json", exclude_unset=True, exclude={"mlflow"})
    return keys | {"output": output}
